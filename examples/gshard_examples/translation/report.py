"""A picture of several systems' scores, by group of languages."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from gshard_examples.translation.package_files import missing_packages
from gshard_examples.translation.score import GROUPINGS
from gshard_tf.io.atomic_files import write_file


def plot_scores(
    path: str | Path,
    sets: Mapping[str, Mapping[str, dict]],
    grouping: str = "family",
    metric: str = "chrf",
) -> None:
    """Draws a panel for each set: horizontal bars, one group of languages a row.

    Args:
        path: The picture; its suffix (`.png`, `.svg`, `.pdf`) is the format.
        sets: Title of a panel -> system name -> `score.score`'s result.
        grouping: One of `score.GROUPINGS`.
        metric: `"chrf"` or `"bleu"`.

    Raises:
        ValueError: An option is wrong, or no system has such groups.
        MissingPackageError: matplotlib is not installed.
    """
    if grouping not in GROUPINGS:
        raise ValueError(
            f"grouping must be one of {', '.join(GROUPINGS)}. Received: "
            f"grouping={grouping!r}"
        )
    if metric not in ("chrf", "bleu"):
        raise ValueError(f"metric must be chrf or bleu. Received: metric={metric!r}")
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise missing_packages(["matplotlib"], "plots are drawn with it") from error
    largest: Counter[str] = Counter()
    for scores in sets.values():
        for group, size in _sizes(scores, grouping).items():
            largest[group] = max(largest[group], size)
    if not largest:
        raise ValueError(f"no scores by {grouping}. Received: {list(sets)}")
    groups = sorted(largest, key=lambda g: (largest[g], g))  # the largest at the top
    figure = Figure(
        figsize=(3 + 5 * len(sets), 1.5 + 0.35 * len(groups)), layout="constrained"
    )
    FigureCanvasAgg(figure)
    panels = figure.subplots(ncols=len(sets), sharex=True, squeeze=False)[0]
    for axes, (title, scores) in zip(panels, sets.items(), strict=True):
        thickness = 0.8 / len(scores)
        for number, (system, result) in enumerate(scores.items()):
            cells = [result.get(grouping, {}).get(group) for group in groups]
            axes.barh(
                [row + 0.4 - thickness * (number + 0.5) for row in range(len(groups))],
                [cell[metric] if cell else 0.0 for cell in cells],
                height=thickness,
                label=system,
            )
        sizes = _sizes(scores, grouping)
        # What a set lacks has no bar, which a score of 0 has not either.
        names = [f"{group} ({sizes.get(group, 'none')})" for group in groups]
        axes.set_yticks(range(len(groups)), names)
        axes.set_xlabel({"chrf": "chrF", "bleu": "BLEU"}[metric])
        axes.set_title(title)
        axes.grid(axis="x", alpha=0.3)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(
        handles,
        labels,
        loc="outside lower center",
        ncols=min(4, len(labels)),
        frameon=False,
    )
    picture = io.BytesIO()
    suffix = Path(path).suffix[1:] or "png"
    # No date inside, so that the same scores give the same file.
    metadata = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}.get(suffix)
    figure.savefig(picture, format=suffix, dpi=120, metadata=metadata)
    write_file(path, picture.getvalue())


def _sizes(scores: Mapping[str, dict], grouping: str) -> dict[str, int]:
    """Returns the number of pairs of each group, the most of any system."""
    sizes: dict[str, int] = {}
    for result in scores.values():
        for group, cell in result.get(grouping, {}).items():
            sizes[group] = max(sizes.get(group, 0), cell["pairs"])
    return sizes
