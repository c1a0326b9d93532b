"""Results of the runs, in small files that are kept when a machine is gone.

`baselines.json` has the corpus and what copying and a translation memory score on it;
`times.json` what steps took; and each run has a file of its own name. So runs of
several days and machines stand in one table.
"""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

from benchmarks.experiment.design import MODELS

_BASELINES, _TIMES = "baselines.json", "times.json"


def keep_baselines(folder: pathlib.Path, baselines: Mapping[str, Any]) -> None:
    """Keeps what all runs share.

    Args:
        folder: The results, made if need be.
        baselines: The `"corpus"` by its digests, the training pairs of each language
            as `"counts"`, and the `"scores"` by test and system.

    Raises:
        ValueError: when the runs that are there are of another corpus.
    """
    path = folder / _BASELINES
    if path.exists():
        kept = json.loads(path.read_text("utf-8"))
        if kept["corpus"] != baselines["corpus"]:
            raise ValueError(
                f"All results of {folder} must be of one corpus, {kept['corpus']}. "
                f"Received: {baselines['corpus']}"
            )
    _write(path, baselines)


def keep_times(folder: pathlib.Path, times: Mapping[str, Any]) -> None:
    """Keeps what a step of each model took, and on what machine."""
    _write(folder / _TIMES, times)


def keep_run(folder: pathlib.Path, run: Mapping[str, Any]) -> None:
    """Keeps a run: its `"row"` of the table and its `"scores"` by test."""
    _write(folder / f"{run['row']['run']}.json", run)


def read_results(folder: pathlib.Path) -> dict[str, Any]:
    """Returns all that is kept.

    Returns:
        `{"counts": language -> training pairs, "times": model -> seconds, "rows": one
        per run, "scores": test -> system or run -> its score}`.

    Raises:
        ValueError: when the folder has no run.
    """
    shared = {folder / _BASELINES, folder / _TIMES}
    paths = [path for path in sorted(folder.glob("*.json")) if path not in shared]
    if not paths or not (folder / _BASELINES).exists():
        raise ValueError(f"There must be results. Received: none in {folder}")
    baselines = json.loads((folder / _BASELINES).read_text("utf-8"))
    times = folder / _TIMES
    results = {
        "counts": baselines["counts"],
        "times": json.loads(times.read_text("utf-8")) if times.exists() else {},
        "rows": [],
        "scores": baselines["scores"],
    }
    for path in paths:
        run = json.loads(path.read_text("utf-8"))
        results["rows"].append(run["row"])
        for test, score in run["scores"].items():
            results["scores"][test][path.stem] = score
    models = list(MODELS)
    results["rows"].sort(
        key=lambda row: (row["language"], models.index(row["model"]), row["seed"])
    )
    return results


def _write(path: pathlib.Path, content: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(content, indent=1, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")
