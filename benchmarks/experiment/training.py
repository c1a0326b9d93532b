"""The runs of the experiment, by `gshard-run`: jax is enough."""

import contextlib
import json
import multiprocessing
import os
import pathlib
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.experiment.carrying import pack_results, use_cache
from benchmarks.experiment.design import RUNS, SIZES, Run, all_runs, chosen_runs
from benchmarks.experiment.results import keep_times
from benchmarks.experiment.translating import TESTS
from benchmarks.harness import machine, timing
from benchmarks.harness.command_line import say
from gshard_tf.export import runner


def read_about(out: pathlib.Path) -> tuple[Any, list[str], list[Run]]:
    """Returns the size of a prepared experiment, its languages and its runs."""
    about = json.loads((out / "experiment.json").read_text())
    size = SIZES[about["size"]]
    return size, about["languages"], all_runs(size, about["languages"])


def steps_of(size: Any, run: Run) -> int:
    """Returns how many steps a run has."""
    return size.bilingual_steps if run.language else size.settings["steps"]


def is_complete(out: pathlib.Path, size: Any, run: Run) -> bool:
    """Returns whether a run was trained and evaluated to its end."""
    return steps_of(size, run) in evaluations_of(out / run.name / "new-pairs")


def train(
    out: pathlib.Path,
    only: Sequence[str],
    minutes: float | None,
    each: float | None = None,
    archive: pathlib.Path | None = None,
) -> None:
    """Trains runs to their ends, from where they are.

    Args:
        out: The prepared folder.
        only: Names of runs; none: all.
        minutes: After which to stop; the next call goes on.
        each: Minutes after which to stop a run, evaluate it where it is, and go on with
            the next one. None: a run may take all of `minutes`.
        archive: A zip file of results, written after each run.

    Raises:
        ValueError: for a name that no run has, or when a run failed; the others were
            trained.
    """
    size, _, runs = read_about(out)
    chosen = chosen_runs(runs, only)
    if size.carried:
        use_cache(out)
    end = None if minutes is None else time.monotonic() + 60 * minutes
    failed = []
    for run in chosen:
        if is_complete(out, size, run):
            continue
        limits = [] if end is None else [end - time.monotonic()]
        limits += [] if each is None else [60 * each]
        if limits and min(limits) <= 0:
            break
        say(f"training {run.name}")
        # A process of its own: the memory of a device is the next run's again.
        process = multiprocessing.get_context("spawn").Process(
            target=_train,
            args=(out, size, run, min(limits, default=None), each is not None),
        )
        process.start()
        process.join()
        if process.exitcode:
            failed.append(f"{run.name} (exit {process.exitcode})")
        if archive is not None:
            pack_results(out, archive)
    if failed:
        raise ValueError(f"All runs must end well. Received: {', '.join(failed)}")


def _train(
    out: pathlib.Path, size: Any, run: Run, limit: float | None, as_it_is: bool
) -> None:
    """Trains a run, and looks at it when it is complete or, if `as_it_is`, anyway."""
    folder, steps = out / run.name, steps_of(size, run)
    more = [] if limit is None else ["--time-limit", f"{limit:.0f}"]
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        _run(
            folder / "train.gshard",
            *("--data", out / run.data, "--out", folder / "run"),
            *("--steps", str(steps), "--log-every", str(min(50, size.save_every))),
            *("--save-every", str(min(size.save_every, steps))),
            *("--evaluate", folder / "eval.gshard", out / "data-dev"),
            *more,
        )
        state = ("--state", folder / "run" / "state.npz")

        def apply(program: str, split: str, to: str) -> None:
            data = ("--data", out / f"data-{split}")
            _run(folder / program, *data, "--out", folder / to, *state)

        if steps not in evaluations_of(folder / "run"):
            if not as_it_is:
                return
            apply("eval.gshard", "dev", "run")
        try:
            for name in TESTS if size.carried else ():
                apply("translate.gshard", name, f"translated-{name}")
        finally:
            # Last: it says that the run is complete.
            apply("eval.gshard", "dev_pairs", "new-pairs")


def _run(program: pathlib.Path, *arguments: Any) -> None:
    if status := runner.main([str(argument) for argument in (program, *arguments)]):
        sys.exit(status)


def evaluations_of(folder: pathlib.Path) -> dict[int, dict[str, Any]]:
    """Returns the evaluations in a folder's log, by step."""
    return {line["step"]: line for line in _log(folder) if line["event"] == "evaluate"}


def training_of(folder: pathlib.Path) -> list[dict[str, Any]]:
    """Returns the lines of training of a folder's log, each step once."""
    lines = {line["step"]: line for line in _log(folder) if line["event"] == "train"}
    return [lines[step] for step in sorted(lines)]


def _log(folder: pathlib.Path) -> list[dict[str, Any]]:
    path = folder / "log.jsonl"
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def measure(out: pathlib.Path, kept: pathlib.Path, rounds: int = 20) -> None:
    """Keeps the seconds of a step of each model that is prepared, taken in turns."""
    from gshard_tf import export

    sides = {}
    for run in RUNS:
        folder = out / run.name
        if run.model in sides or not folder.exists():
            continue
        program = export.load(folder / "train.gshard")
        arrays, _ = export.read_state(folder / "start.npz")
        batches = export.ArrayBatches(out / run.data, program.manifest.inputs)
        sides[run.model] = _step_of(program, arrays, batches)
    times = timing.alternate(sides, rounds, warm_up=2)
    medians = {model: timing.median(times, model) for model in sides}
    keep_times(kept, {"machine": machine.describe(), "seconds": medians})
    say(str(medians))


def _step_of(program: Any, arrays: Any, batches: Any) -> Callable[[], object]:
    import jax

    current = {"state": program.put_state(arrays), "number": 0}

    def step() -> None:
        batch = batches.batch(current["number"])
        _, current["state"] = program(batch, current["state"])
        current["number"] = (current["number"] + 1) % len(batches)
        jax.block_until_ready(current["state"])

    return step
