"""A picture of several systems' scores, by group of languages."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path

from gshard_examples.translation.package_files import missing_packages
from gshard_examples.translation.score import GROUPINGS
from gshard_tf.io.atomic_files import write_file


def plot_scores(
    path: str | Path,
    scores: Mapping[str, dict],
    grouping: str = "family",
    metric: str = "chrf",
    title: str = "",
) -> None:
    """Draws horizontal bars, one group of languages a row, one bar per system.

    Args:
        path: The picture; its suffix (`.png`, `.svg`, `.pdf`) is the format.
        scores: System name -> `score.score`'s result.
        grouping: One of `score.GROUPINGS`.
        metric: `"chrf"` or `"bleu"`.
        title: Goes above.

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
    sizes: dict[str, int] = {}
    for result in scores.values():
        for group, cell in result.get(grouping, {}).items():
            sizes[group] = max(sizes.get(group, 0), cell["pairs"])
    if not sizes:
        raise ValueError(f"no scores by {grouping}. Received: {list(scores)}")
    groups = sorted(sizes, key=lambda g: (sizes[g], g))  # the largest at the top
    thickness = 0.8 / len(scores)
    figure = Figure(figsize=(8, 1.5 + 0.35 * len(groups)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for number, (system, result) in enumerate(scores.items()):
        cells = [result.get(grouping, {}).get(group) for group in groups]
        axes.barh(
            [row + 0.4 - thickness * (number + 0.5) for row in range(len(groups))],
            [cell[metric] if cell else 0.0 for cell in cells],
            height=thickness,
            label=system,
        )
    axes.set_yticks(
        range(len(groups)), [f"{group} ({sizes[group]})" for group in groups]
    )
    axes.set_xlabel({"chrf": "chrF", "bleu": "BLEU"}[metric])
    axes.set_title(title)
    axes.grid(axis="x", alpha=0.3)
    figure.legend(loc="outside lower center", ncols=min(4, len(scores)), frameon=False)
    picture = io.BytesIO()
    suffix = Path(path).suffix[1:] or "png"
    # No date inside, so that the same scores give the same file.
    metadata = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}.get(suffix)
    figure.savefig(picture, format=suffix, dpi=120, metadata=metadata)
    write_file(path, picture.getvalue())
