"""Results of the experiment: the tables for the docs, and the plot."""

import pathlib
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

#: Names of tests in tables.
NAMES = {"test_pairs": "new pairs", "test": "new messages", "udhr": "udhr"}


def write_report(results: Mapping[str, Any], folder: pathlib.Path) -> None:
    """Prints all tables and draws `experts.png` into a folder."""
    print(format_results(results))
    folder.mkdir(parents=True, exist_ok=True)
    plot(results, folder / "experts.png")


def format_results(results: Mapping[str, Any]) -> str:
    """Returns all tables."""
    rows = [row for row in results["rows"] if not row["language"]]
    parts = [table_of_runs(rows, list(results["scores"]), results["times"])]
    for metric, shown in (("chrf", "chrF"), ("bleu", "BLEU")):
        for name, scores in results["scores"].items():
            table = _by_level(rows, scores, metric)
            parts.append(f"{NAMES[name]}, {shown}\n\n{table}")
    alone = [row for row in results["rows"] if row["language"]]
    if alone:
        parts.append(_bilingual(alone, rows, results))
    return "\n\n".join(parts) + "\n"


def _table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def table_of_runs(
    rows: Sequence[Mapping[str, Any]], tests: Sequence[str], times: Mapping[str, Any]
) -> str:
    """Returns a line for each run: sizes, losses, and chrF of some tests."""
    seconds = times.get("seconds", {})
    head = [
        *("run", "weights", "tokens", "s/step", "train", "new messages", "new pairs"),
        *(f"{NAMES[name]}, chrF" for name in tests),
    ]
    lines = []
    for row in rows:
        losses = row["new_messages"]
        lines.append(
            [
                row["run"],
                f"{row['parameters'] / 1e6:.2f} M",
                f"{row['tokens'] / 1e6:.1f} M",
                f"{seconds[row['model']]:.3f}" if row["model"] in seconds else "",
                f"{row['train_nll']:.3f}",
                f"{losses[max(losses, key=int)]:.3f}",
                f"{row['new_pairs_nll']:.3f}",
                *(f"{row['chrf'][name]:.1f}" for name in tests),
            ]
        )
    return _table(head, lines)


def _models(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """Returns model -> its runs."""
    models: dict[str, list[str]] = {}
    for row in rows:
        models.setdefault(row["model"], []).append(row["run"])
    return models


def _by_level(
    rows: Sequence[Mapping[str, Any]], scores: Mapping[str, Any], metric: str
) -> str:
    """A line for all pairs and for each resource level; means over seeds, and range."""
    models = _models(rows)
    levels = ["", *scores["copy"].get("resources", {})]
    lines = []
    for level in levels:

        def cell(system: str, level: str = level) -> Mapping[str, Any]:
            found = scores[system]
            return found["resources"][level] if level else found["overall"]

        line = [level or "all", str(cell("copy")["pairs"])]
        line += [f"{cell(name)[metric]:.1f}" for name in ("copy", "memory")]
        for runs in models.values():
            values = [cell(run)[metric] for run in runs]
            spread = f" ± {(max(values) - min(values)) / 2:.1f}" if runs[1:] else ""
            line.append(f"{statistics.mean(values):.1f}{spread}")
        lines.append(line)
    return _table(["", "pairs", "copy", "memory", *models], lines)


def _bilingual(
    alone: Sequence[Mapping[str, Any]],
    rows: Sequence[Mapping[str, Any]],
    results: Mapping[str, Any],
) -> str:
    """The paper's comparison: each model over a model of one language alone."""
    models = _models(rows)
    gains: dict[str, list[float]] = {model: [] for model in models}
    lines = []
    for row in sorted(alone, key=lambda row: -results["counts"][row["language"]]):
        language = row["language"]
        scores = results["scores"]["test_pairs"]
        if row["run"] not in scores:
            continue  # no new pair of this language
        base = scores[row["run"]]["overall"]["bleu"]
        for model, runs in models.items():
            over = [scores[run]["language"][language]["bleu"] - base for run in runs]
            gains[model].append(statistics.mean(over))
        lines.append(
            [
                language,
                str(results["counts"][language]),
                f"{row['epochs']:.1f}",
                f"{base:.1f}",
                *(f"{each[-1]:+.1f}" for each in gains.values()),
            ]
        )
    if lines:
        means = [f"{statistics.mean(each):+.1f}" for each in gains.values()]
        lines.append(["mean", "", "", "", *means])
    head = ["language", "training pairs", "epochs", "bilingual, BLEU", *models]
    return "new pairs, BLEU over a bilingual model\n\n" + _table(head, lines)


def plot(results: Mapping[str, Any], path: pathlib.Path) -> None:
    """Draws quality over dense: by experts, as the paper's Figure 1, and by level."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = [row for row in results["rows"] if not row["language"]]
    equal = [row for row in rows if row["model"] != "wide"]
    sizes = sorted({row["experts"] for row in equal})
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(ncols=2)
    for color, name in enumerate(results["scores"]):

        def value(row: Mapping[str, Any], name: str = name) -> float:
            return row["chrf"][name]

        base = _mean(equal, 0, value)
        for row in equal:
            x = sizes.index(row["experts"])
            left.plot(x, value(row) - base, "o", color=f"C{color}", alpha=0.5)
        gains = [_mean(equal, experts, value) - base for experts in sizes]
        left.plot(range(len(sizes)), gains, color=f"C{color}", label=NAMES[name])
    left.set_xticks(range(len(sizes)), [str(size or "dense") for size in sizes])
    left.set_xlabel("experts, at equal FLOPs per token")
    left.set_ylabel("chrF above dense")
    left.legend()
    scores = results["scores"]["test_pairs"]
    levels = list(scores["copy"].get("resources", {}))
    models = _models(rows)
    base_of = models.pop("dense")
    for number, (model, runs) in enumerate(models.items()):
        gains = [
            _level_mean(scores, runs, level) - _level_mean(scores, base_of, level)
            for level in levels
        ]
        shift = 0.8 * ((number + 0.5) / len(models) - 0.5)
        places = [place + shift for place in range(len(levels))]
        right.bar(places, gains, width=0.8 / len(models), label=model)
    right.set_xticks(range(len(levels)), levels)
    right.set_xlabel("training pairs of the language")
    right.set_ylabel("chrF above dense on new pairs")
    right.axhline(0, color="black", linewidth=0.5)
    if models:
        right.legend()
    figure.savefig(path, dpi=120)


def _mean(
    rows: Sequence[Mapping[str, Any]],
    experts: int,
    value: Callable[[Mapping[str, Any]], float],
) -> float:
    return statistics.mean(value(row) for row in rows if row["experts"] == experts)


def _level_mean(scores: Mapping[str, Any], runs: Sequence[str], level: str) -> float:
    return statistics.mean(scores[run]["resources"][level]["chrf"] for run in runs)
