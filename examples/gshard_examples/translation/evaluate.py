"""Scores of a run on held-out pairs, compared with the baselines."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from gshard_examples.translation.baselines import (
    TranslationMemory,
    copy_source,
    translate_with_apertium,
)
from gshard_examples.translation.corpus import Corpus, Pair
from gshard_examples.translation.report import plot_scores
from gshard_examples.translation.sampling import draw_pairs
from gshard_examples.translation.score import format_table, score, write_scores
from gshard_examples.translation.translator import Translator
from gshard_tf.io.atomic_files import write_file
from gshard_tf.io.paths import local_path, make_folder


def choose(
    pairs: Sequence[Pair], per_language: int, languages: Sequence[str] | None, seed: int
) -> list[Pair]:
    """Returns at most `per_language` pairs of each language, always the same ones."""
    by_language = defaultdict(list)
    for pair in pairs:
        if languages is None or pair.lang in languages:
            by_language[pair.lang].append(pair)
    generator = np.random.default_rng(seed)
    chosen = []
    for tag in sorted(by_language):
        chosen += draw_pairs(by_language[tag], per_language, generator)
    return chosen


def evaluate(
    translator: Translator,
    corpus: Corpus,
    sets: Mapping[str, Sequence[Pair]],
    out: str | Path,
    progress: Callable[[str], None],
) -> dict[str, dict]:
    """Translates held-out pairs; scores the model, copying and a translation memory.

    For each set writes `scores.json`, `scores.txt` and `translations.tsv` to
    `out/evaluation-NAME`, and a picture of all sets, `out/scores.png`. Where Apertium
    is installed with some of the languages, all are compared with it on the pairs of
    these: `scores-apertium.json`, and a second table in `scores.txt`.

    Args:
        translator: What to score.
        corpus: What it was trained on, for the translation memory.
        sets: Name -> pairs, none of them empty. The names of splits, say.
        out: The folder for the picture and the folders of results.
        progress: Called with a line now and then.

    Returns:
        Name of the set -> system -> `score.score`'s result.
    """
    out = local_path(out, "out")
    folders = {name: make_folder(out / f"evaluation-{name}", "out") for name in sets}
    pairs = [pair for some in sets.values() for pair in some]
    start = time.perf_counter()
    progress(f"translating {len(pairs)} sentences")
    translations = translator.translate(
        [p.lang for p in pairs], [p.source for p in pairs]
    )
    seconds = time.perf_counter() - start
    progress(f"translated in {seconds:.0f} s; now the baselines")
    # Of all sets at once: the memory reads the training text of a language once.
    systems = {
        "model": translations,
        "memory": TranslationMemory(corpus.read("train")).translate(pairs),
        "copy": copy_source(pairs),
    }
    counts = corpus.languages("train")
    results, begin = {}, 0
    for name, some in sets.items():
        rows = slice(begin, begin + len(some))
        begin += len(some)
        said = {system: texts[rows] for system, texts in systems.items()}
        results[name] = _write(folders[name], name, some, said, counts, progress)
    panels = {_title(name, some): results[name] for name, some in sets.items()}
    plot_scores(out / "scores.png", panels)
    return results


def _title(name: str, pairs: Sequence[Pair]) -> str:
    return f"{name}: {len(pairs)} pairs"


def _write(
    out: Path,
    name: str,
    pairs: Sequence[Pair],
    systems: Mapping[str, list[str]],
    counts: Mapping[str, int],
    progress: Callable[[str], None],
) -> dict:
    """Scores systems on one set, and writes what `evaluate` says."""
    scores = {name: score(pairs, texts, counts) for name, texts in systems.items()}
    write_scores(out / "scores.json", scores)
    table = format_table(scores, ("domain", "resources", "family"))
    tables = f"{_title(name, pairs)}\n\n{table}\n"
    apertium = translate_with_apertium(pairs)
    if apertium.positions:
        some = [pairs[i] for i in apertium.positions]
        beside = {"apertium": score(some, apertium.translations, counts)}
        for system, texts in systems.items():
            beside[system] = score(some, [texts[i] for i in apertium.positions], counts)
        write_scores(out / "scores-apertium.json", beside)
        table = format_table(beside, ("domain", "language"))
        tables += f"\nThe {len(some)} pairs of Apertium's languages\n\n{table}\n"
    write_file(out / "scores.txt", tables.encode())
    rows = [
        "\t".join((p.lang, p.source, p.english, t))
        for p, t in zip(pairs, systems["model"], strict=True)
    ]
    write_file(out / "translations.tsv", ("\n".join(rows) + "\n").encode())
    return scores
