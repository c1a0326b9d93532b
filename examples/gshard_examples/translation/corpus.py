"""Making a corpus folder, and reading one.

A corpus is a folder of tab-separated files, one per split, and a `manifest.json` that
says where every byte came from: package versions, options, counts, checksums.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from gshard_examples.translation.clean import clean_pair
from gshard_examples.translation.languages import (
    base_language,
    normalize_language,
)
from gshard_examples.translation.own_split import assign_own_splits
from gshard_examples.translation.package_files import sha256_of
from gshard_examples.translation.sources import NAME_DOMAINS, Source, corpus_sources
from gshard_examples.translation.split import (
    MIN_WORDS,
    PAIR_SPLITS,
    SPLITS,
    assign_splits,
    choose_new_pairs,
    message_key,
)
from gshard_tf.io.atomic_files import write_synced
from gshard_tf.io.atomic_folders import Contents, new_folder
from gshard_tf.io.paths import local_path

log = logging.getLogger(__name__)

#: Goes up when the files or the meaning of the manifest change.
FORMAT_VERSION = 2
MANIFEST = "manifest.json"
COLUMNS = ("lang", "domain", "source", "english")
#: What is in a corpus folder, and so may be replaced: vocabularies and caches too.
CORPUS = Contents(
    "a corpus",
    (
        MANIFEST,
        *(f"{split}.tsv" for split in SPLITS),
        "vocab*.model",
        "cache/ids-*.npz",
    ),
    mark=MANIFEST,
)

#: Share of the widely translated messages that are tested on, by corpus.
DEFAULT_HELD_OUT = {"S": 0.2, "M": 0.06, "D": 0.06}

#: The name of a corpus of somebody's own text; `own_text` prepares it.
OWN = "own"

#: Called with (what is being done, done so far, total or None).
Progress = Callable[[str, int, int | None], None]


class CorpusError(ValueError):
    """A corpus folder is not whole, or not what its manifest says."""


class Pair(NamedTuple):
    """One sentence pair."""

    lang: str
    domain: str
    source: str
    english: str

    @property
    def is_name(self) -> bool:
        """True for a proper name from an ISO standard, false for a message."""
        return self.domain in NAME_DOMAINS


# ------------------------------------------------------------------------- preparing


def prepare_corpus(
    out_dir: str | Path,
    corpus: str = "S",
    held_out: float | None = None,
    languages: Iterable[str] | None = None,
    folder: str | Path | None = None,
    replace: bool = False,
    progress: Progress | None = None,
    sources: Sequence[Source] | None = None,
    held_out_sources: Mapping[str, Source] | None = None,
) -> Corpus:
    """Makes a corpus folder from message catalogues.

    The folder appears under its name only when it is complete; a run that is killed
    leaves nothing that `load_corpus` would accept, and may simply be repeated.  Two
    runs with the same packages and options give the same bytes.

    Args:
        out_dir: The folder to make.
        corpus: `"S"` (installed pip packages), `"M"` (wheels) or `"D"` (Debian
            packages); see `sources.corpus_sources`.
        held_out: Share of the widely translated English messages that go to the test
            set, half as many going to the development set. By default 0.2 for S and
            0.06 for the larger M and D. A larger share gives steadier scores per
            language and less to train on.
        languages: Keep only these language tags (`"de"`, `"sr_Latn"`). The split
            is made before, on all languages, so a subset has the same held-out
            messages as the whole. Of the new pairs it has those whose message another
            language of the subset trains; the others are left out.
        folder: Where the package files of M and D lie.
        replace: Whether to replace a folder that is there already, with its
            vocabularies and caches, which belong to the old text. It must be empty, or
            hold a corpus and nothing else.
        progress: Called now and then with (activity, done, total or None).
        sources: The sources themselves, instead of those of a named corpus.
        held_out_sources: `"dev"`, `"test"` or both -> a source of its pairs, instead
            of those held out. Their messages leave what trains.

    Returns:
        The corpus, loaded.

    Raises:
        ValueError: An option is wrong, or no pair was found.
        MissingPackageError: A package to read from or with is not installed.
        FileNotFoundError: A package file of M or D is not in `folder`.
        FileExistsError: `out_dir` exists, and `replace` is false or it holds
            anything but a corpus.
        AlreadyRunningError: Another process is making `out_dir` just now.
        OSError: It could not be written (disk full, ...); nothing is published.
    """
    selected = _checked_languages(languages)
    if sources is None:
        sources = corpus_sources(corpus, folder)
    if held_out is None and corpus != OWN:
        held_out = DEFAULT_HELD_OUT.get(corpus, 0.06)
    if held_out is not None:
        assign_splits({}, held_out)  # complain about the option before the work
    options = {
        "held_out": held_out,
        "languages": sorted(selected) if selected is not None else None,
    }
    progress = progress or (lambda activity, done, total: None)
    with new_folder(out_dir, replace, CORPUS) as partial:
        domain_of, reports = _extract(sources, progress)
        _check_usable(domain_of, reports)
        given = {}
        for split, source in (held_out_sources or {}).items():
            given[split], report = _extract([source], progress)
            _check_usable(given[split], report)
            reports |= report
        progress("splitting", 0, None)
        rows, decided = _split(domain_of, given, options, corpus == OWN)
        progress("splitting", len(domain_of), len(domain_of))
        if not rows["train"]:
            raise ValueError(
                f"no training pair is left. Received: languages={options['languages']}"
            )
        files = {}
        for number, split in enumerate(SPLITS):
            progress("writing", number, len(SPLITS))
            data = "".join("\t".join(row) + "\n" for row in rows[split]).encode()
            write_synced(partial / f"{split}.tsv", data)
            files[f"{split}.tsv"] = {
                "bytes": len(data),
                "sha256": hashlib.sha256(data).hexdigest(),
            }
        manifest = {
            "format": FORMAT_VERSION,
            "corpus": corpus,
            "options": options | decided,
            "sources": reports,
            "files": files,
            "counts": {split: _counts(rows[split]) for split in SPLITS},
            "totals": _totals(rows),
        }
        text = json.dumps(manifest, indent=1, sort_keys=True, ensure_ascii=False)
        # Last, so that a folder with a manifest is a whole one.
        write_synced(partial / MANIFEST, (text + "\n").encode())
        progress("writing", len(SPLITS), len(SPLITS))
    return load_corpus(out_dir, verify=False)


def _checked_languages(languages: Iterable[str] | None) -> frozenset[str] | None:
    if languages is None:
        return None
    if isinstance(languages, str):
        raise ValueError(
            "languages must be a list of language tags, not one string. Received: "
            f"languages={languages!r}"
        )
    selected = frozenset(languages)
    for tag in sorted(selected):
        if normalize_language(tag) != tag:
            known = normalize_language(tag)
            hint = f"; write {known!r}" if known else ""
            raise ValueError(
                f"languages must be tags of this corpus{hint}. Received: languages "
                f"with {tag!r}"
            )
    if not selected:
        raise ValueError("languages must not be empty. Received: languages=[]")
    return selected


def _extract(
    sources: Sequence[Source], progress: Progress
) -> tuple[dict[tuple[str, str, str], str], dict[str, dict]]:
    """Reads and cleans all sources.

    Returns:
        (lang, source, english) -> its domain, the first source that has it; and what
        the manifest says of each source.
    """
    domain_of: dict[tuple[str, str, str], str] = {}
    reports = {}
    # Names last: a pair that is also a message counts as a message.
    for source in sorted(sources, key=lambda s: s.domain in NAME_DOMAINS):
        skipped: Counter[str] = Counter()
        raw = new = 0
        tags: dict[str, str | None] = {}
        for raw, entry in enumerate(source.read(skipped), start=1):
            if raw % 20_000 == 0:
                progress(f"reading {source.domain}", raw, None)
            locale, text, english = entry
            if locale not in tags:
                tags[locale] = normalize_language(locale)
            tag = tags[locale]
            if tag is None:
                skipped["not a language of the corpus"] += 1
                continue
            if not text or not english:
                skipped["empty"] += 1
                continue
            cleaned = clean_pair(tag, text, english, source.accelerator)
            if isinstance(cleaned, str):
                skipped[cleaned] += 1
                continue
            if domain_of.setdefault((tag, *cleaned), source.domain) == source.domain:
                new += 1
        progress(f"reading {source.domain}", raw, raw)
        log.info("%s: %d entries, %d usable", source.domain, raw, new)
        reports[source.domain] = {
            "version": source.version,
            "licence": source.licence,
            "inputs": source.inputs,
            "entries": raw,
            "pairs": 0,
            "skipped": dict(skipped),
        }
    for domain, pairs in Counter(domain_of.values()).items():
        reports[domain]["pairs"] = pairs
    return domain_of, reports


def _check_usable(found: Mapping, reports: Mapping[str, dict]) -> None:
    if not found:
        why = sum(
            (Counter(report["skipped"]) for report in reports.values()), Counter()
        )
        listed = ", ".join(f"{reason}: {count}" for reason, count in why.most_common())
        raise ValueError(
            f"no usable sentence pair in {', '.join(reports)}"
            + (f" ({listed})" if listed else "")
        )


#: (language tag, source, English) -> domain, as `_extract` returns it.
DomainOf = Mapping[tuple[str, str, str], str]


def _split(
    domain_of: DomainOf, given: Mapping[str, DomainOf], options: dict, own: bool
) -> tuple[dict[str, list[Pair]], dict]:
    """Splits the pairs.

    Args:
        domain_of: What is to be split.
        given: Splits that come from elsewhere.
        options: `held_out` and `languages`, as in the manifest.
        own: Whether the rules are those of `own_split`.

    Returns:
        The pairs of each split, and what was decided, for the manifest.
    """
    key_of = {
        english: message_key(english)
        for found in (domain_of, *given.values())
        for _, _, english in found
    }
    rows: dict[str, list[Pair]] = {split: [] for split in SPLITS}
    decided: dict = {}
    taken: set[str] = set()  # messages of given splits
    removed = 0
    for split in sorted(given, reverse=True):  # what is in both is in the test
        for (tag, source, english), domain in given[split].items():
            if key_of[english] not in taken:
                rows[split].append(Pair(tag, domain, source, english))
        taken |= {key_of[english] for _, _, english in given[split]}
    languages_of = defaultdict(set)
    for tag, _, english in domain_of:
        if key_of[english] in taken:
            removed += 1
        else:
            languages_of[key_of[english]].add(base_language(tag))
    min_words = MIN_WORDS
    if own:
        made = [split for split in ("dev", "test") if split not in given]
        split_of, decided = assign_own_splits(languages_of, options["held_out"], made)
        min_words = decided["min_words"]
    else:
        split_of = assign_splits(languages_of, options["held_out"])
    if given:
        log.info("%s pairs of held-out messages do not train", f"{removed:,}")
        decided["removed"] = removed
    new_pairs = choose_new_pairs(
        (
            (tag, source, key_of[english])
            for tag, source, english in domain_of
            if split_of.get(key_of[english]) == "train"
        ),
        min_words=min_words,
    )
    for (tag, source, english), domain in domain_of.items():
        key = key_of[english]
        if key not in taken:
            split = new_pairs.get((tag, key)) or split_of[key]
            rows[split].append(Pair(tag, domain, source, english))
    if options["languages"] is not None:
        selected = set(options["languages"])
        for split, pairs in rows.items():
            rows[split] = [pair for pair in pairs if pair.lang in selected]
        _drop_unknown(rows, key_of)
    for pairs in rows.values():
        pairs.sort()
    return rows, decided


def _drop_unknown(rows: dict[str, list[Pair]], key_of: dict[str, str]) -> None:
    """Leaves out the new pairs whose message no other kept language trains.

    They do not train either: the corpus of all languages tests on them.
    """
    known = defaultdict(set)
    for pair in rows["train"]:
        known[key_of[pair.english]].add(base_language(pair.lang))
    for split in PAIR_SPLITS:
        rows[split] = [
            pair
            for pair in rows[split]
            if known[key_of[pair.english]] - {base_language(pair.lang)}
        ]


def _counts(pairs: Sequence[Pair]) -> dict:
    by_language: dict[str, int] = Counter(pair.lang for pair in pairs)
    return {
        "pairs": len(pairs),
        "messages": len({message_key(pair.english) for pair in pairs}),
        "names": sum(pair.is_name for pair in pairs),
        "languages": dict(by_language),
        "domains": dict(Counter(pair.domain for pair in pairs)),
    }


def _totals(rows: dict[str, list[Pair]]) -> dict:
    pairs = [pair for split in SPLITS for pair in rows[split]]
    by_language = Counter(base_language(pair.lang) for pair in pairs)
    return {
        "pairs": len(pairs),
        "english_messages": len({message_key(pair.english) for pair in pairs}),
        "languages": len(by_language),
        "languages_with": {
            str(least): sum(n >= least for n in by_language.values())
            for least in (200, 500, 1000, 2000)
        },
    }


# --------------------------------------------------------------------------- reading


@dataclass(frozen=True)
class Corpus:
    """A corpus folder that has been found whole.

    Attributes:
        path: The folder.
        manifest: What `manifest.json` says.
    """

    path: Path
    manifest: dict = field(repr=False)

    def read(self, split: str) -> list[Pair]:
        """Returns the pairs of a split, sorted by language, domain and text.

        Raises:
            ValueError: No such split.
            CorpusError: The file is not what it was when the corpus was made.
        """
        return list(self.iterate(split))

    def iterate(self, split: str) -> Iterator[Pair]:
        """Yields the pairs of a split one by one."""
        self._check_split(split)
        path = self.path / f"{split}.tsv"
        with open(path, encoding="utf-8", newline="\n") as file:
            for number, line in enumerate(file, start=1):
                columns = line.rstrip("\n").split("\t")
                if len(columns) != len(COLUMNS):
                    raise CorpusError(
                        f"{path}, line {number}: {len(COLUMNS)} columns "
                        f"({', '.join(COLUMNS)}) were expected. Received: "
                        f"{len(columns)}"
                    )
                yield Pair(*columns)

    def languages(self, split: str = "train") -> dict[str, int]:
        """Returns language tag -> pairs in a split, the largest language first."""
        self._check_split(split)
        counts = self.manifest["counts"][split]["languages"]
        return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))

    def sha256(self, split: str) -> str:
        """Returns the checksum of a split's file, as a name for its contents."""
        self._check_split(split)
        return self.manifest["files"][f"{split}.tsv"]["sha256"]

    def _check_split(self, split: str) -> None:
        if split not in SPLITS:
            raise ValueError(
                f"split must be one of {', '.join(SPLITS)}. Received: split={split!r}"
            )


def load_corpus(path: str | Path, verify: bool = True) -> Corpus:
    """Opens a corpus folder.

    Args:
        path: The folder that `prepare_corpus` made.
        verify: Whether to compare every file's checksum with the manifest (a second
            or so for the large corpora); otherwise only its size.

    Raises:
        FileNotFoundError: There is no such folder.
        CorpusError: The folder is not a whole corpus, its files were altered, or
            another version of this program made it.
    """
    path = local_path(path)
    if not path.is_dir():
        raise FileNotFoundError(f"no corpus at {path}: prepare one first")
    try:
        manifest = json.loads((path / MANIFEST).read_bytes().decode("utf-8"))
    except FileNotFoundError as error:
        raise CorpusError(
            f"{path} has no {MANIFEST}: not a corpus, or a half-written one. "
            "Prepare it again"
        ) from error
    except ValueError as error:
        raise CorpusError(f"{path / MANIFEST} is damaged: {error}") from error
    version = manifest.get("format") if isinstance(manifest, dict) else None
    if version != FORMAT_VERSION:
        raise CorpusError(
            f"{path} has corpus format {version}; this program reads format "
            f"{FORMAT_VERSION}. Prepare it again: gshard-translate prepare --replace "
            f"--data {path}"
        )
    for name, facts in manifest["files"].items():
        file = path / name
        if not file.is_file():
            raise CorpusError(f"{path} lacks {name}. Prepare it again")
        size = os.path.getsize(file)
        if size != facts["bytes"]:
            raise CorpusError(
                f"{file} should have {facts['bytes']} bytes. Received: {size}. "
                "Prepare the corpus again"
            )
        if verify and sha256_of(file) != facts["sha256"]:
            raise CorpusError(
                f"{file} was altered: its checksum is not the manifest's. "
                "Prepare the corpus again"
            )
    return Corpus(path, manifest)
