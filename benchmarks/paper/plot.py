"""The rows of `benchmarks.paper.table` beside the paper's points, as a picture.

    python -m benchmarks.paper.table --json > rows.jsonl
    python -m benchmarks.paper.plot rows.jsonl docs/paper-models.png

Four panels over the number of experts, a line for each depth and kind of row: memory,
FLOPs, bytes of collectives and estimated time of a step, each per core. The paper's
memory (Figure 7) and measured step times (Table 3) are crosses. Needs matplotlib.
"""

import argparse
import json
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

PANELS = (
    ("hbm_gb", "paper_hbm_gb", "memory, GB"),
    ("tflops", None, "products, TFLOP"),
    ("collective_gb", None, "collectives, GB"),
    ("step_s_roofline", "paper_step_s", "step, s (ours: a lower bound)"),
)


def lines_of(rows: list[dict[str, Any]]) -> dict[str, dict[int, dict[str, Any]]]:
    """Kind of model, such as "36L:bf16", -> experts -> row."""
    series: dict[str, dict[int, dict[str, Any]]] = defaultdict(dict)
    for row in rows:
        parts = re.fullmatch(r"(\d+)E(\d+L.*)", row["model"])
        if parts is not None:  # a dense model has no number of experts
            series[parts[2]][int(parts[1])] = row
    return series


def draw(rows: list[dict[str, Any]], path: str) -> None:
    """Writes the picture."""
    from matplotlib import pyplot

    figure, grid = pyplot.subplots(1, 4, figsize=(17, 4.6), layout="constrained")
    for axes, (ours, theirs, label) in zip(grid, PANELS, strict=True):
        shown: dict[tuple[str, int], float] = {}
        ticks: set[int] = set()
        for number, (kind, line) in enumerate(sorted(lines_of(rows).items())):
            points = sorted((e, r[ours]) for e, r in line.items() if r[ours])
            ticks |= {e for e, _ in points}
            style = "o-" if len(points) > 1 else "o"
            axes.plot(*zip(*points, strict=True), style, color=f"C{number}", label=kind)
            depth = kind.split(":")[0]
            for experts, row in line.items():
                if theirs and row[theirs]:
                    shown[depth, experts] = row[theirs]
        for depth in sorted({depth for depth, _ in shown}):
            points = sorted((e, y) for (d, e), y in shown.items() if d == depth)
            marker = "x--" if depth == "12L" else "+--"
            axes.plot(
                *zip(*points, strict=True),
                marker,
                color="gray",
                label=f"paper, {depth}",
            )
        axes.set(xscale="log", xlabel="experts", title=label, ylim=(0, None))
        axes.set_xticks(sorted(ticks), [str(e) for e in sorted(ticks)])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    # The first panel has all the lines that there are.
    figure.legend(*grid[0].get_legend_handles_labels(), loc="outside lower center",
                  ncols=8)  # fmt: skip
    figure.suptitle(
        "A train step per core of TPU v3, compiled; as many cores as experts"
    )
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("rows", help="lines of `benchmarks.paper.table --json`")
    parser.add_argument("picture", help="the PNG to write")
    options = parser.parse_args()
    lines = Path(options.rows).read_text().splitlines()
    draw([json.loads(line) for line in lines if line.strip()], options.picture)


if __name__ == "__main__":
    main()
