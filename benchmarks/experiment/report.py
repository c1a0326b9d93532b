"""Results of `benchmarks.experiment.run`: the table for the docs, and the plot."""

import pathlib
import statistics
from collections.abc import Mapping, Sequence
from typing import Any


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The comparison, for the docs."""
    lines = [
        "| experts | seed | weights | s/step | train loss | validation loss "
        "| test chrF / BLEU | udhr chrF / BLEU |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        scores = [
            f"{row[n]['overall']['chrf']} / {row[n]['overall']['bleu']}"
            if n in row
            else "-"
            for n in ("test", "udhr")
        ]
        loss = row["validation"][max(row["validation"])]
        lines.append(
            f"| {row['experts'] or 'dense'} | {row['seed']} "
            f"| {row['parameters'] / 1e6:.1f} M | {row['seconds_per_step']:.2f} "
            f"| {row['train_nll']:.3f} | {loss:.3f} | {scores[0]} | {scores[1]} |"
        )
    return "\n".join(lines)


def plot(rows: Sequence[Mapping[str, Any]], path: pathlib.Path) -> None:
    """Quality over the dense model against the cost of training: the paper's Figure 1.

    One point per run, one curve through the means.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    def cost(row: Mapping[str, Any]) -> float:
        return row["seconds_per_step"] * row["steps"] / 3600

    def mean(experts: int, value: Any) -> float:
        return statistics.mean(value(r) for r in rows if r["experts"] == experts)

    sizes = sorted({row["experts"] for row in rows})
    figure, axes = pyplot.subplots(1, 2, figsize=(9, 4))
    measures = {
        "validation loss below dense, nats": lambda r: (
            -r["validation"][max(r["validation"])]
        ),
        "chrF above dense": lambda r: r["test"]["overall"]["chrf"],
    }
    for axis, (label, value) in zip(axes, measures.items(), strict=True):
        base = mean(0, value)
        for row in rows:
            axis.plot(cost(row), value(row) - base, "o", color="C0", alpha=0.5)
        xs = [mean(experts, cost) for experts in sizes]
        ys = [mean(experts, value) - base for experts in sizes]
        axis.plot(xs, ys, "-", color="C0")
        for experts, x, y in zip(sizes, xs, ys, strict=True):
            axis.annotate(str(experts or "dense"), (x, y))
        axis.set_xlabel("hours of training")
        axis.set_ylabel(label)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
