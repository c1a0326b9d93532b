"""The options of `gshard-translate` that name somebody's own text."""

from __future__ import annotations

import argparse
from pathlib import Path

from gshard_examples.translation.corpus import Corpus, load_corpus
from gshard_examples.translation.own_text import (
    OwnText,
    check_same_text,
    language_tag,
    moses_files,
    prepare_own_text,
    tsv_files,
)
from gshard_tf.io.paths import path_option


def add_own_text(parser: argparse.ArgumentParser) -> None:
    """Adds the options."""
    group = parser.add_argument_group(
        "your own text", "instead of --corpus; --data names the folder to make"
    )
    group.add_argument(
        "--tsv",
        nargs="+",
        type=path_option,
        metavar="FILE",
        help="UTF-8, each line: language, source, English, with tabs between",
    )
    group.add_argument(
        "--moses",
        nargs="+",
        type=_moses,
        metavar="TAG=SOURCE,ENGLISH",
        help="two files of a sentence a line: de=corpus.de,corpus.en",
    )
    for split, text in (("dev", "choose checkpoints on"), ("test", "test on")):
        group.add_argument(
            f"--{split}-tsv",
            nargs="+",
            type=path_option,
            metavar="FILE",
            help=f"pairs to {text}; by default some are held out",
        )
    group.add_argument(
        "--held-out",
        type=float,
        help="share of the English messages to test on; by default it suits the size",
    )
    group.add_argument(
        "--skip-broken",
        action="store_true",
        help="leave broken lines out and count them; by default one is an error",
    )


def _moses(text: str) -> tuple[str, Path, Path]:
    tag, equals, files = text.partition("=")
    paths = files.split(",")
    if not equals or len(paths) != 2 or not all(paths):
        raise argparse.ArgumentTypeError(
            "TAG=SOURCE,ENGLISH was expected, such as de=corpus.de,corpus.en. "
            f"Received: {text!r}"
        )
    try:
        language_tag(tag)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return tag, path_option(paths[0]), path_option(paths[1])


def own_corpus(options: argparse.Namespace, replace: bool) -> Corpus | None:
    """Returns the corpus of the own text that the options name; None without any.

    A folder that holds it already is used as it is, so that a command can be repeated.

    Raises:
        ValueError: An option is wrong, or see `own_text.prepare_own_text`.
        OSError: A file cannot be read, or the corpus not be written.
    """
    parts = [tsv_files(*options.tsv)] if options.tsv else []
    parts += [moses_files(*names) for names in options.moses or ()]
    texts: dict[str, OwnText | None] = {
        split: tsv_files(*paths) if paths else None
        for split, paths in (("dev", options.dev_tsv), ("test", options.test_tsv))
    }
    if not parts:
        given = {
            "--dev-tsv": options.dev_tsv,
            "--test-tsv": options.test_tsv,
            "--held-out": options.held_out is not None,
            "--skip-broken": options.skip_broken,
        }
        if any(given.values()):
            raise ValueError(
                "--tsv or --moses must name the text to train on. Received: "
                + ", ".join(name for name, value in given.items() if value)
            )
        return None
    if options.data == Path("data/S"):
        raise ValueError(
            "--data must name a folder for the corpus of your own text. Received: "
            f"--data {options.data}, which is for corpus S"
        )
    text = parts[0]
    for part in parts[1:]:
        text += part
    if options.data.exists() and not replace:
        corpus = load_corpus(options.data)
        check_same_text(corpus, {"train": text, **texts}, options.held_out)
        return corpus
    print(f"Preparing your text in {options.data} ...", flush=True)
    return prepare_own_text(
        options.data,
        text,
        texts["dev"],
        texts["test"],
        options.held_out,
        options.skip_broken,
        replace,
    )
