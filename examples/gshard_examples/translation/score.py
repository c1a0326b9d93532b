"""Scores of translations: overall, and for every group of languages.

BLEU and chrF are sacrebleu's, with its defaults.  Lead with chrF: messages are short,
and BLEU of short texts that are mostly placeholders and names flatters whoever copies.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from gshard_examples.translation.corpus import Pair
from gshard_examples.translation.languages import (
    RESOURCE_LEVELS,
    family_of,
    resource_level,
    script_of,
)
from gshard_examples.translation.package_files import missing_packages
from gshard_tf.io.atomic_files import write_file

#: Groupings, in the order of the table.
GROUPINGS = ("domain", "resources", "family", "script", "language")


def score(
    pairs: Sequence[Pair],
    translations: Sequence[str],
    training_pairs: Mapping[str, int] | None = None,
) -> dict:
    """Scores translations against the pairs' English.

    Args:
        pairs: The test pairs.
        translations: One per pair.
        training_pairs: Language tag -> number of training pairs
            (`corpus.languages("train")`), for the groups by resource level; without
            it there are none.

    Returns:
        `{"overall": s, "domain": {group: s}, "resources": ..., "family": ...,
        "script": ..., "language": ..., "signature": ...}` where `s` is
        `{"pairs": int, "bleu": float, "chrf": float}`, and the domain groups are
        `"messages"`, `"names"` (ISO names) and each source's own name. Everything
        can go into JSON.

    Raises:
        ValueError: The numbers differ, or there is nothing to score.
        MissingPackageError: sacrebleu is not installed.
    """
    if len(pairs) != len(translations):
        raise ValueError(
            "every pair needs one translation. Received: "
            f"{len(pairs)} pairs, {len(translations)} translations"
        )
    if not pairs:
        raise ValueError("there must be pairs to score. Received: 0 pairs")
    bleu, chrf = _metrics()

    def scored(positions: Sequence[int]) -> dict:
        hypotheses = [translations[i] for i in positions]
        references = [[pairs[i].english for i in positions]]
        return {
            "pairs": len(positions),
            "bleu": round(bleu.corpus_score(hypotheses, references).score, 2),
            "chrf": round(chrf.corpus_score(hypotheses, references).score, 2),
        }

    groups_of: dict[str, Callable[[Pair], Sequence[str]]] = {
        "domain": lambda p: ("names" if p.is_name else "messages", f"from {p.domain}"),
        "family": lambda p: (family_of(p.lang),),
        "script": lambda p: (script_of(p.lang),),
        "language": lambda p: (p.lang,),
    }
    if training_pairs is not None:
        groups_of["resources"] = lambda p: (
            resource_level(training_pairs.get(p.lang, 0)),
        )
    result: dict = {"overall": scored(range(len(pairs)))}
    for grouping in GROUPINGS:
        if grouping not in groups_of:
            continue
        positions = defaultdict(list)
        for position, pair in enumerate(pairs):
            for group in groups_of[grouping](pair):
                positions[group].append(position)
        order = sorted(positions)
        if grouping == "resources":  # richest first
            order = [level for level in RESOURCE_LEVELS if level in positions]
        result[grouping] = {group: scored(positions[group]) for group in order}
    result["signature"] = {
        "bleu": str(bleu.get_signature()),
        "chrf": str(chrf.get_signature()),
    }
    return result


def overall_chrf(pairs: Sequence[Pair], translations: Sequence[str]) -> float:
    """Returns `score(pairs, translations)["overall"]["chrf"]`, and counts only that."""
    _, chrf = _metrics()
    references = [[pair.english for pair in pairs]]
    return round(chrf.corpus_score(list(translations), references).score, 2)


def _metrics() -> tuple[Any, Any]:
    """BLEU and chrF of sacrebleu."""
    try:
        from sacrebleu.metrics import BLEU, CHRF
    except ImportError as error:
        raise missing_packages(["sacrebleu"], "scores are computed with it") from error
    return BLEU(), CHRF()


def write_scores(path: str | Path, scores: Mapping[str, dict]) -> None:
    """Writes system name -> `score`'s result as JSON."""
    text = json.dumps(scores, indent=1, sort_keys=True, ensure_ascii=False)
    write_file(path, (text + "\n").encode())


def format_table(
    scores: Mapping[str, dict], groupings: Sequence[str] = ("domain", "resources")
) -> str:
    """Formats the scores of one or more systems as a plain-text table.

    Three systems fit a screen of 80 columns.

    Args:
        scores: System name -> `score`'s result, all of the same pairs.
        groupings: Which of `GROUPINGS` to show below the overall row.

    Raises:
        ValueError: No system, or an unknown grouping.
    """
    if not scores:
        raise ValueError("there must be a system to show. Received: scores={}")
    for grouping in groupings:
        if grouping not in GROUPINGS:
            raise ValueError(
                f"groupings must be among {', '.join(GROUPINGS)}. "
                f"Received: {grouping!r}"
            )
    head = ["chrF / BLEU", "pairs", *scores]
    lines: list[list[str] | None] = [head, None]
    lines.append(_row("all", [result["overall"] for result in scores.values()]))
    for grouping in groupings:
        groups = list(
            dict.fromkeys(g for r in scores.values() for g in r.get(grouping, ()))
        )
        if not groups:
            continue
        lines.append(None)
        for group in groups:
            cells = [r.get(grouping, {}).get(group) for r in scores.values()]
            lines.append(_row(group, cells))
    widths = [max(len(row[i]) for row in lines if row) for i in range(len(head))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        if row
        else "-" * (sum(widths) + 2 * (len(widths) - 1))
        for row in lines
    )


def _row(name: str, cells: Sequence[dict | None]) -> list[str]:
    row = [name, str(max((cell["pairs"] for cell in cells if cell), default=0))]
    for cell in cells:
        row.append(f"{cell['chrf']:.1f} / {cell['bleu']:4.1f}" if cell else "-")
    return row
