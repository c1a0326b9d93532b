"""Translations and scores of the experiment's models beside the baselines."""

import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from benchmarks.experiment.design import MODELS, Run
from benchmarks.experiment.report import format_results, plot
from benchmarks.experiment.sharing import expert_use, plot_sharing
from benchmarks.experiment.training import (
    evaluations_of,
    is_complete,
    read_about,
    training_of,
)
from benchmarks.harness.command_line import say

#: The corpus's tests: new messages, and new pairs of known ones.
TESTS = ("test_pairs", "test")
#: Sentences of each language whose routing is looked at.
ROUTED = 50


def score(data: pathlib.Path, out: pathlib.Path, udhr: pathlib.Path | None) -> None:
    """Translates, scores and plots the runs that are complete, each once.

    Raises:
        ValueError: when the steps were not measured, or no run is complete.
    """
    if not (out / "times.json").exists():
        raise ValueError(f"The steps must be measured first. Received: no `time {out}`")
    from gshard_examples.translation.corpus import load_corpus
    from gshard_examples.translation.evaluate import choose
    from gshard_examples.translation.udhr import load_udhr

    size, languages, runs = read_about(out)
    runs = [run for run in runs if is_complete(out, size, run)]
    if not runs:
        raise ValueError(f"A run must be complete. Received: none in {out}")
    corpus = load_corpus(data)
    sets = {name: corpus.read(name) for name in TESTS}
    if udhr is not None:
        sets["udhr"] = load_udhr(udhr)
    scores = {
        name: _score_set(
            name, choose(pairs, size.per_language, languages, seed=0), corpus, out, runs
        )
        for name, pairs in sets.items()
    }
    rows = [_row(out, run, scores) for run in runs]
    results = {"counts": corpus.languages("train"), "rows": rows, "scores": scores}
    (out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    print(format_results(results))
    plot(results, out / "experts.png")
    for run in runs:
        if MODELS[run.model].experts:
            _sharing(corpus, out, run, choose(sets["test"], ROUTED, languages, seed=0))


def _score_set(
    name: str,
    pairs: Sequence[Any],
    corpus: Any,
    out: pathlib.Path,
    runs: Sequence[Run],
) -> dict[str, Any]:
    """Returns system -> its score; of a bilingual run on the pairs of its language."""
    from gshard_examples.translation.baselines import TranslationMemory, copy_source
    from gshard_examples.translation.score import score as score_of

    counts = corpus.languages("train")
    systems = {"copy": copy_source(pairs)}
    systems["memory"] = _kept(
        out / f"memory-{name}.json",
        lambda: TranslationMemory(corpus.read("train")).translate(pairs),
    )
    scores = {key: score_of(pairs, texts, counts) for key, texts in systems.items()}
    for run in runs:
        some = [p for p in pairs if run.language in ("", p.lang)]
        if not some:
            continue
        folder = out / run.name
        texts = _kept(
            folder / f"{name}.json",
            lambda folder=folder, some=some: _translate(folder, out, some),
        )
        scores[run.name] = score_of(some, texts, counts)
    return scores


def _kept(path: pathlib.Path, make: Callable[[], list[str]]) -> list[str]:
    """Translations that take minutes, made once."""
    if not path.exists():
        say(f"translating for {path}")
        path.write_text(json.dumps(make()))
    return json.loads(path.read_text())


def _model(folder: pathlib.Path, out: pathlib.Path) -> tuple[Any, Any]:
    """Returns the trained model of a run, and its vocabulary."""
    import keras

    from gshard_examples.translation.model import make_model
    from gshard_examples.translation.settings import Settings
    from gshard_examples.translation.vocabulary import Vocabulary
    from gshard_tf import export

    keras.backend.clear_session()
    vocabulary = Vocabulary(out / "vocab.model")
    model = make_model(Settings.read(folder), vocabulary)
    export.load_state(model, folder / "run" / "state.npz")
    return model, vocabulary


def _translate(
    folder: pathlib.Path, out: pathlib.Path, pairs: Sequence[Any]
) -> list[str]:
    from gshard_examples.translation.translator import Translator

    # Greedily: a wider beam finds more of the frequent messages in unsure models.
    translator = Translator(*_model(folder, out), beam_size=1)
    return translator.translate([p.lang for p in pairs], [p.source for p in pairs])


def _row(out: pathlib.Path, run: Run, scores: dict[str, Any]) -> dict[str, Any]:
    from gshard_tf import export

    folder = out / run.name
    new_messages = evaluations_of(folder / "run")
    new_pairs = evaluations_of(folder / "new-pairs")
    training = training_of(folder / "run")
    manifest = export.read_manifest(folder / "train.gshard")
    times = json.loads((out / "times.json").read_text())
    about = json.loads((out / run.data / "about.json").read_text())
    last = training[-max(1, len(training) // 20) :]
    return {
        "run": run.name,
        "model": run.model,
        "seed": run.seed,
        "language": run.language,
        "experts": MODELS[run.model].experts,
        "parameters": sum(
            int(np.prod(t.shape)) for t in manifest.state if t.role == "weight"
        ),
        "seconds_per_step": times[run.model],
        "steps": max(new_messages),
        "tokens": about["tokens"],
        "epochs": about["epochs"],
        # Over the last twentieth; of batches that are new if there was one epoch.
        "train_nll": float(np.mean([line["nll"] for line in last])),
        "progress": {line["step"]: line["nll"] for line in training},
        "new_messages": {step: line["nll"] for step, line in new_messages.items()},
        "new_pairs_nll": new_pairs[max(new_pairs)]["nll"],
        "dropped": {
            name: float(np.mean([line[name] for line in last]))
            for name in last[-1]
            if name.endswith("_dropped")
        },
        "chrf": {
            name: of_set[run.name]["overall"]["chrf"]
            for name, of_set in scores.items()
            if run.name in of_set
        },
    }


def _sharing(corpus: Any, out: pathlib.Path, run: Run, pairs: Sequence[Any]) -> None:
    """Draws which languages share experts."""
    picture = out / run.name / "sharing.png"
    if not picture.exists():
        say(f"routing for {picture}")
        model, vocabulary = _model(out / run.name, out)
        plot_sharing(
            expert_use(model, vocabulary, pairs),
            corpus.languages("train"),
            picture,
        )
