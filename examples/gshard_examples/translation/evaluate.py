"""Scores of a run on held-out pairs, compared with the baselines."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from gshard_examples.translation.baselines import (
    TranslationMemory,
    copy_source,
    translate_with_apertium,
)
from gshard_examples.translation.corpus import Corpus, Pair
from gshard_examples.translation.report import plot_scores
from gshard_examples.translation.score import format_table, score, write_scores
from gshard_examples.translation.translator import Translator
from gshard_tf.io.atomic_files import write_file
from gshard_tf.io.paths import make_folder


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
        rows = by_language[tag]
        if len(rows) > per_language:
            picked = generator.choice(len(rows), per_language, replace=False)
            rows = [rows[i] for i in sorted(picked)]
        chosen += rows
    return chosen


def evaluate(
    translator: Translator,
    corpus: Corpus,
    pairs: Sequence[Pair],
    out: Path,
    title: str,
    progress: Callable[[str], None],
) -> dict:
    """Translates `pairs`, scores them, and scores copying and a translation memory.

    Writes `scores.json`, `scores.txt`, `scores.png` and `translations.tsv` to `out`.
    Where Apertium is installed with some of these languages, all are compared with it
    on the pairs of these: `scores-apertium.json`, and a second table in `scores.txt`.

    Returns:
        System name -> `score.score`'s result.
    """
    out = make_folder(out, "out")  # before the work
    start = time.perf_counter()
    progress(f"translating {len(pairs)} sentences")
    translations = translator.translate(
        [p.lang for p in pairs], [p.source for p in pairs]
    )
    seconds = time.perf_counter() - start
    progress(f"translated in {seconds:.0f} s; now the baselines")
    systems = {
        "model": translations,
        "memory": TranslationMemory(corpus.read("train")).translate(pairs),
        "copy": copy_source(pairs),
    }
    counts = corpus.languages("train")
    scores = {name: score(pairs, texts, counts) for name, texts in systems.items()}
    write_scores(out / "scores.json", scores)
    table = format_table(scores, ("domain", "resources", "family"))
    tables = f"{title}\n\n{table}\n"
    apertium = translate_with_apertium(pairs)
    if apertium.positions:
        some = [pairs[i] for i in apertium.positions]
        beside = {"apertium": score(some, apertium.translations, counts)}
        for name, texts in systems.items():
            beside[name] = score(some, [texts[i] for i in apertium.positions], counts)
        write_scores(out / "scores-apertium.json", beside)
        table = format_table(beside, ("domain", "language"))
        tables += f"\nThe {len(some)} pairs of Apertium's languages\n\n{table}\n"
    write_file(out / "scores.txt", tables.encode())
    rows = [
        "\t".join((p.lang, p.source, p.english, t))
        for p, t in zip(pairs, translations, strict=True)
    ]
    write_file(out / "translations.tsv", ("\n".join(rows) + "\n").encode())
    plot_scores(out / "scores.png", scores, "family", title=title)
    return scores
