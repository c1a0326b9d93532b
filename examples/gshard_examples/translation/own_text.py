"""A corpus of your own text: tab-separated files, Moses files, or pairs from Python.

Every line is checked before anything is made of it, and an error names file and line.
"""

from __future__ import annotations

import functools
import logging
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gshard_examples.translation.catalogues import Entry
from gshard_examples.translation.corpus import OWN, Corpus, Progress, prepare_corpus
from gshard_examples.translation.languages import family_of, normalize_language
from gshard_examples.translation.package_files import missing_packages, sha256_of
from gshard_examples.translation.sources import Source

log = logging.getLogger(__name__)

#: From this share of lines that cleaning leaves out, the log warns.
MANY_LEFT_OUT = 0.05

COLUMNS = ("language", "source", "English")
# A tab is between columns.
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_LOCALE = re.compile(r"[A-Za-z]{2,3}([-_@.][A-Za-z0-9@._-]*)?")
_PRIVATE_USE = re.compile(r"q[a-t][a-z]")  # of ISO 639

#: A place for messages ("a.tsv, line 3"), and the columns that are there.
Line = tuple[str, Sequence[str | bytes]]


class BrokenLineError(ValueError):
    """A line of somebody's text is not a sentence pair.

    Attributes:
        kind: In few words, to count by.
    """

    def __init__(self, place: str, kind: str, message: str):
        super().__init__(f"{place}: {message}")
        self.kind = kind


@dataclass(frozen=True)
class OwnText:
    """Lines of text that somebody has; `tsv_files`, `moses_files` and `pairs` make it.

    Attributes:
        lines: Called without arguments; gives the lines.
        inputs: File name -> SHA-256, to recognize the files by; empty for pairs that
            come from Python.
    """

    lines: Callable[[], Iterator[Line]]
    inputs: dict[str, str] = field(default_factory=dict)

    def __add__(self, other: OwnText) -> OwnText:
        def lines() -> Iterator[Line]:
            yield from self.lines()
            yield from other.lines()

        return OwnText(lines, _joined(self.inputs, other.inputs))


def tsv_files(*paths: str | Path) -> OwnText:
    """Text of tab-separated files: language, source, English on each line.

    Args:
        paths: UTF-8 files, with or without a byte order mark, of any languages.

    Raises:
        OSError: A file cannot be read.
        ValueError: A file is empty, or there is none.
    """
    if not paths:
        raise ValueError("`paths` must name a file. Received: none")

    def lines() -> Iterator[Line]:
        for path in paths:
            for place, line in _lines_of(Path(path)):
                yield place, line.split(b"\t")

    return OwnText(lines, _inputs(paths))


def moses_files(
    language: str, source_path: str | Path, english_path: str | Path
) -> OwnText:
    """Text of two files with a sentence a line, as OPUS has in its format "Moses".

    Args:
        language: The language tag of `source_path`.
        source_path: The UTF-8 file of sources.
        english_path: That of their English, line by line.

    Raises:
        OSError: A file cannot be read.
        ValueError: A file is empty, the files have different numbers of lines, or
            `language` is not the tag of a language.
    """
    language_tag(language)
    paths = (Path(source_path), Path(english_path))
    counts = []
    for path in paths:
        with open(path, "rb") as file:
            counts.append(sum(1 for _ in file))
    if counts[0] != counts[1]:
        raise ValueError(
            "The two files of a language must have a line for each other's. Received: "
            f"{paths[0]} with {counts[0]:,} lines, {paths[1]} with {counts[1]:,}"
        )

    def lines() -> Iterator[Line]:
        both = zip(_lines_of(paths[0]), _lines_of(paths[1]), strict=True)
        for (place, source), (other, english) in both:
            yield f"{place} ({other})", (language, source, english)

    return OwnText(lines, _inputs(paths))


def pairs(examples: Iterable[Any]) -> OwnText:
    """Text from Python.

    Args:
        examples: `(language, source, english)` for each pair, strings or UTF-8 bytes;
            a `tf.data.Dataset` of three scalar strings will do, unbatched. Read once.
    """

    def lines() -> Iterator[Line]:
        # (A dataset's own iterator gives tensors.)
        numpy = getattr(examples, "as_numpy_iterator", None)
        for number, example in enumerate(numpy() if numpy else examples):
            place = f"pair {number}"
            if not isinstance(example, tuple | list) or not all(
                isinstance(value, str | bytes) for value in example
            ):
                raise TypeError(
                    f"{place}: (language, source, english) was expected, each a string "
                    f"or bytes. Received: {example!r:.120}"
                )
            yield place, example

    return OwnText(lines)


def _lines_of(path: Path) -> Iterator[tuple[str, bytes]]:
    """Yields (place, line without its end)."""
    number = 0
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            yield f"{path}, line {number}", line.removesuffix(b"\n").removesuffix(b"\r")
    if not number:
        raise ValueError(f"{path} is empty")


def _inputs(paths: Iterable[str | Path]) -> dict[str, str]:
    inputs: dict[str, str] = {}
    for path in paths:
        inputs = _joined(inputs, {Path(path).name: sha256_of(Path(path))})
    return inputs


def _joined(one: Mapping[str, str], other: Mapping[str, str]) -> dict[str, str]:
    """Both; of two files with one name, in different folders, the second is "a (2)"."""
    joined = dict(one)
    for name, digest in other.items():
        number, unique = 1, name
        while unique in joined:
            number += 1
            unique = f"{name} ({number})"
        joined[unique] = digest
    return joined


# -------------------------------------------------------------------------- checking


@functools.cache
def language_tag(text: str) -> str:
    """Returns the corpus's tag of a language: `"de"` for `"de_AT"`, see `languages`.

    Raises:
        ValueError: It is no language of ISO 639 (nor its private `qaa` to `qtz`), it is
            English, or one of the constructed languages that the corpus leaves out.
    """
    expected = "a language tag such as de, pt_BR or sr_Latn was expected"
    if not _LOCALE.fullmatch(text):
        raise ValueError(f"{expected}{_named(text)}. Received: {text[:40]!r}")
    tag = normalize_language(text)
    if tag is None:
        raise ValueError(
            f"{expected}, of another language than English and of none that was "
            f"invented. Received: {text!r}"
        )
    code = tag.partition("_")[0]
    if family_of(tag) == "Other" and not _PRIVATE_USE.fullmatch(code):
        languages = _iso_languages()
        if not languages.get(**{"alpha_2" if len(code) == 2 else "alpha_3": code}):
            raise ValueError(
                f"{expected}; ISO 639 has none of this code (for a language of your "
                f"own take qaa to qtz). Received: {text!r}"
            )
    return tag


def _named(text: str) -> str:
    """A hint for whoever writes a language's name."""
    try:
        found = _iso_languages().lookup(text)
    except LookupError:
        return ""
    return f" (that of {found.name} is {getattr(found, 'alpha_2', found.alpha_3)})"


def _iso_languages() -> Any:
    try:
        import pycountry
    except ImportError as error:
        raise missing_packages(
            ["pycountry"], "language tags are looked up in it"
        ) from error
    return pycountry.languages


def checked(line: Line) -> Entry:
    """Returns the language tag, source and English of a line.

    Raises:
        BrokenLineError: It is no sentence pair.
    """
    place, columns = line
    if len(columns) != len(COLUMNS):
        raise BrokenLineError(
            place,
            "wrong number of columns",
            f"{len(COLUMNS)} columns with tabs between ({', '.join(COLUMNS)}) were "
            f"expected. Received: {len(columns)}",
        )
    texts = []
    for name, value in zip(COLUMNS, columns, strict=True):
        if isinstance(value, bytes):
            try:
                value = value.decode("utf-8")
            except UnicodeDecodeError as error:
                raise BrokenLineError(
                    place,
                    "not UTF-8",
                    f"UTF-8 was expected. Received: {value[error.start :][:8]!r} in "
                    f"the {name} at byte {error.start} ({error.reason})",
                ) from error
        control = _CONTROL.search(value)
        if control:
            raise BrokenLineError(
                place,
                "control character",
                "text without control characters was expected. Received: "
                f"U+{ord(control[0]):04X} in the {name} at character {control.start()}",
            )
        if not value.strip():
            raise BrokenLineError(
                place,
                f"empty {name}",
                f"the {name} must not be empty. Received: {value!r}",
            )
        texts.append(value)
    try:
        tag = language_tag(texts[0].strip())
    except ValueError as error:
        raise BrokenLineError(place, "unknown language", str(error)) from error
    return Entry(tag, texts[1], texts[2])


# ------------------------------------------------------------------------- preparing


def prepare_own_text(
    out_dir: str | Path,
    text: OwnText | Iterable[Any],
    dev: OwnText | Iterable[Any] | None = None,
    test: OwnText | Iterable[Any] | None = None,
    held_out: float | None = None,
    skip_broken: bool = False,
    replace: bool = False,
    progress: Progress | None = None,
) -> Corpus:
    """Makes a corpus folder of your own sentence pairs; docs/corpus.md has examples.

    The text is cleaned as that of catalogues is (`clean.clean_pair`); the manifest
    counts what is left out, and the log warns if it is much. The splits are those of
    the other corpora, with sizes that suit small ones too (`own_split`).

    Args:
        out_dir: The folder to make.
        text: `tsv_files(...)`, `moses_files(...)`, sums of such, or what `pairs`
            takes: an iterable or `tf.data.Dataset` of `(language, source, english)`.
        dev: The pairs to choose checkpoints on. By default they are held out of `text`.
        test: The pairs of the strict test; held out of `text` by default. Messages of
            given pairs, in whatever language, leave `text`.
        held_out: Share of the English messages that go to the test, half as many to
            dev: 0 to 0.6. By default 1,000 messages or a tenth, whichever is less; in
            a corpus whose messages are much alike more, until there is a strict test.
        skip_broken: Leave broken lines out, and count them in the manifest, rather
            than raise an error at the first one.
        replace: Whether to replace a corpus that is in `out_dir`.
        progress: Called now and then with (activity, done, total or None).

    Returns:
        The corpus, loaded.

    Raises:
        BrokenLineError: A line is not a sentence pair; the message names it.
        TypeError: What `text` gives are not triples of strings.
        ValueError: An option is wrong, no pair is usable, or too few to hold any out.
        FileExistsError: `out_dir` exists, and `replace` is false or it holds
            anything but a corpus.
        OSError: Something cannot be read or written.
    """
    sources = {
        split: _source(split, given, skip_broken)
        for split, given in (("train", text), ("dev", dev), ("test", test))
        if given is not None
    }
    training = sources.pop("train")
    corpus = prepare_corpus(
        out_dir,
        OWN,
        held_out,
        replace=replace,
        progress=progress,
        sources=[training],
        held_out_sources=sources,
    )
    for domain, report in corpus.manifest["sources"].items():
        left_out = sum(report["skipped"].values())
        total = report["entries"] + sum(
            count for why, count in report["skipped"].items() if why.startswith("lines")
        )
        if left_out:
            log.log(
                logging.WARNING if left_out > MANY_LEFT_OUT * total else logging.INFO,
                "%s: %s of %s lines are left out (%s)",
                domain,
                f"{left_out:,}",
                f"{total:,}",
                ", ".join(
                    f"{why}: {count:,}"
                    for why, count in Counter(report["skipped"]).most_common()
                ),
            )
    return corpus


def _source(split: str, text: Any, skip_broken: bool) -> Source:
    if not isinstance(text, OwnText):
        text = pairs(text)

    def read(skipped: Counter) -> Iterator[Entry]:
        for line in text.lines():
            try:
                entry = checked(line)
            except BrokenLineError as error:
                if not skip_broken:
                    raise
                skipped[f"lines: {error.kind}"] += 1
            else:
                yield entry

    domain = OWN if split == "train" else f"{OWN}-{split}"
    return Source(domain, "", "your own", "", read, dict(text.inputs))


def check_same_text(
    corpus: Corpus,
    texts: Mapping[str, OwnText | None],
    held_out: float | None = None,
) -> None:
    """Checks that a corpus was made of these files.

    Args:
        corpus: A corpus of whatever text.
        texts: `"train"`, and perhaps `"dev"` and `"test"`.
        held_out: As `prepare_own_text` was given it.

    Raises:
        ValueError: It was made of others, or with another `held_out`.
    """
    wanted = {
        (OWN if split == "train" else f"{OWN}-{split}"): text.inputs
        for split, text in texts.items()
        if text is not None
    }
    manifest = corpus.manifest
    found = {domain: source["inputs"] for domain, source in manifest["sources"].items()}
    asked = manifest["options"].get("asked_held_out")
    if found != wanted or asked != held_out:
        files = [name for inputs in found.values() for name in inputs]
        raise ValueError(
            f"{corpus.path} must hold a corpus of the named files as they are now. "
            "Name another folder with --data, or replace this one with `prepare "
            f"--replace`. Received: corpus {manifest['corpus']!r}"
            + (f" of {', '.join(files)}, held_out={asked}" if files else "")
        )
