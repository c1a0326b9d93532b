"""Trains, evaluates or predicts with saved programs; needs jax and flatbuffers alone.

    python -m gshard_tf.export.runner train.gshard --data data/train --out run \\
        --steps 1000 --save-every 200 --evaluate eval.gshard data/dev

What it does is in the program file, which
`gshard_tf.export.step_program(model, mode, batch).save(path)` writes. Training resumes
from the state in --out, if there is one. Each line of standard output, and of
OUT/log.jsonl, is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import pathlib
import signal
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, TextIO

import numpy as np

from gshard_tf.export import program_file
from gshard_tf.export.array_dataset import Batches
from gshard_tf.export.manifest import Manifest
from gshard_tf.io.paths import make_folder, path_option
from gshard_tf.runtime.termination import Termination

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        prog="python -m gshard_tf.export.runner", description=__doc__.split("\n", 1)[0]
    )
    add = made.add_argument
    add("program", type=path_option, help="file of the step: train, evaluate, predict")
    add("--data", type=path_option, required=True, help="folder of its arrays")
    add("--out", type=path_option, help="folder for log, state and predictions")
    add(
        "--state",
        type=path_option,
        help="state to begin with, where OUT/state.npz is not there yet; by default "
        "the one that the program file names",
    )
    add("--steps", type=int, help="train up to this step, counted from the first")
    add("--time-limit", type=float, help="seconds after which to save and stop")
    add(
        "--grace",
        type=float,
        default=30.0,
        help="seconds from SIGTERM to the end of the process, with exit code 75; the "
        "step that runs ends, and its state is saved (30)",
    )
    add("--log-every", type=int, default=10, help="steps; what is logged is their mean")
    add("--save-every", type=int, help="steps between saves; the last state is saved")
    add("--shuffle", type=int, help="seed of the order of rows; none: as in the file")
    add(
        "--evaluate",
        nargs=2,
        metavar=("PROGRAM", "DATA"),
        type=path_option,
        help="evaluate with this program and data each time the state is saved",
    )
    add("--devices", type=int, help="how many to use; by default as many as can be")
    add("--platform", choices=PLATFORMS, help="their kind; by default what jax finds")
    return made


class Log:
    """JSON lines to standard output and, if there is one, to a file."""

    def __init__(self, folder: pathlib.Path | None):
        self._file: TextIO | None = None
        if folder is not None:
            make_folder(folder)
            self._file = open(folder / "log.jsonl", "a", encoding="utf-8")

    def __call__(self, event: str, **fields: Any) -> None:
        """Writes one line, at once."""
        line = json.dumps({"event": event, **fields})
        print(line, flush=True)
        if self._file is not None:
            print(line, file=self._file, flush=True)


class Stop:
    """Inside it, Ctrl-C lets the step that runs end, and its state be saved.

    A second one ends the process as usual.

    Attributes:
        reason: Which signal came, or None.
    """

    def __init__(self) -> None:
        self.reason: str | None = None
        self._before: Any = None

    def __enter__(self) -> Stop:
        self._before = signal.signal(signal.SIGINT, self._heard)
        return self

    def __exit__(self, *error: Any) -> None:
        signal.signal(signal.SIGINT, self._before)

    def _heard(self, number: int, frame: Any) -> None:
        self.reason = signal.Signals(number).name
        signal.signal(number, self._before)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit status."""
    options = parser().parse_args(arguments)
    try:
        manifest = program_file.read_manifest(options.program)
        _start_jax(options, manifest)
        log = Log(options.out)
        if manifest.mode == "train":
            return _train(options, log)
        return _pass(options, log)
    except (ValueError, OSError, ImportError) as error:
        print(f"gshard_tf.export.runner: {error}", file=sys.stderr)
        return 2


def _start_jax(options: argparse.Namespace, manifest: Manifest) -> None:
    """Chooses the platform, and asks for virtual devices on CPUs."""
    if options.platform:
        os.environ["JAX_PLATFORMS"] = options.platform
    from gshard_tf.runtime.devices import request_cpu_devices

    # (Where jax finds other devices, nobody uses these.)
    request_cpu_devices(options.devices or manifest.variants[0].devices)
    import jax

    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:
        # (It only asserts where it lacks the plugin of a platform.)
        wanted = options.platform or os.environ.get("JAX_PLATFORMS") or "any platform"
        raise ValueError(
            f"jax finds no devices of {wanted} here. Take another --platform, or "
            f"install what this one needs. jax says: {error!r}"
        ) from error


def _state(options: argparse.Namespace) -> tuple[dict[str, np.ndarray], int]:
    """The state to go on with, and the steps it has seen."""
    path = _begin_with(options)
    arrays, meta = program_file.read_state(path)
    return arrays, int(meta.get("step", 0))


def _begin_with(options: argparse.Namespace) -> pathlib.Path:
    if options.out is not None and (options.out / "state.npz").is_file():
        return options.out / "state.npz"
    if options.state is not None:
        return options.state
    named = program_file.read_manifest(options.program).initial_state
    if named is None:
        raise ValueError(
            f"{options.program} names no state to begin with: give one with --state."
        )
    return options.program.parent / named


# ------------------------------------------------------------------------ training


def _train(options: argparse.Namespace, log: Log) -> int:
    if options.steps is None and options.time_limit is None:
        raise ValueError("Training needs an end: --steps, --time-limit or both.")
    if options.out is None:
        raise ValueError("Training needs a folder for its state: --out.")
    if not options.grace > 0:
        raise ValueError(f"--grace is more than 0 s. Received: {options.grace}")
    begun = time.perf_counter()
    arrays, step = _state(options)
    if _begin_with(options) == options.out / "state.npz" and _end(options, step, 0.0):
        log("end", reason="steps", step=step, seconds=0.0)
        return 0
    program, batches = _load(options.program, options.data, options, log)
    evaluation, saved = None, -1
    termination = Termination(
        options.grace, lambda frame: True, lambda: f"Step {saved} was saved last."
    )
    if options.evaluate:
        evaluation = Evaluation(
            *options.evaluate, options, log, lambda: termination.is_requested
        )
    state = program.put_state(arrays)
    since, last = time.perf_counter(), step
    previous: Any = None

    def save() -> None:
        _save(options.out, state, step, log)

    with Stop() as stop, termination:
        while True:
            reason = stop.reason or _end(options, step, time.perf_counter() - begun)
            if not reason and not termination.may_begin():
                reason = "SIGTERM"
            if reason:
                break
            outputs, state = program(batches.batch(step), state)
            step += 1
            # One step runs while the next one is prepared, and no more: the clock
            # would not see them.
            _wait(previous)
            previous = outputs
            if step % options.log_every == 0:
                said, now = numbers(outputs), time.perf_counter()
                pace = (now - since) / (step - last)
                log("train", step=step, **said, seconds_per_step=pace)
                since, last = now, step
                # As Keras does at each epoch: what is logged is the mean since then.
                state = program.reset_metrics(state)
            if options.save_every and step % options.save_every == 0:
                save()
                saved = step
                if evaluation is not None:
                    state = evaluation(state, step)
                since, last = time.perf_counter(), step
        if saved != step:
            save()
            saved = step
            if evaluation is not None and reason == "steps":
                evaluation(state, step)
        log("end", reason=reason, step=step, seconds=time.perf_counter() - begun)
        if reason == "SIGTERM":
            termination.leave(f"the run is saved at step {step}.")
    return 0


def _end(options: argparse.Namespace, step: int, seconds: float) -> str | None:
    """Why to stop here, if there is a reason."""
    if options.steps is not None and step >= options.steps:
        return "steps"
    if options.time_limit is not None and seconds >= options.time_limit:
        return "time"
    return None


def _load(
    path: pathlib.Path, data: pathlib.Path, options: argparse.Namespace, log: Log
) -> tuple[Any, Batches]:
    from gshard_tf.export.loader import load

    begun = time.perf_counter()
    program = load(path, options.devices)
    training = program.manifest.mode == "train"
    batches = Batches(
        data,
        program.manifest.inputs,
        options.shuffle if training else None,
        every_row=not training,
    )
    log(
        "load",
        program=path.name,
        mode=program.manifest.mode,
        mesh=program.mesh,
        device=program.device_kind,
        batches=len(batches),
        seconds=time.perf_counter() - begun,
    )
    return program, batches


def _save(out: pathlib.Path, state: dict[str, Any], step: int, log: Log) -> None:
    begun = time.perf_counter()
    arrays = {name: np.asarray(value) for name, value in state.items()}
    program_file.write_state(out / "state.npz", arrays, step=step)
    log("save", step=step, seconds=time.perf_counter() - begun)


def _wait(outputs: Any) -> None:
    import jax

    jax.block_until_ready(outputs)


def numbers(outputs: dict[str, Any]) -> dict[str, Any]:
    """The scalars among the outputs as JSON has them: NaN is null."""
    found = {}
    for name, value in outputs.items():
        if value.ndim == 0:
            number = float(value)
            found[name] = number if math.isfinite(number) else None
    return found


# ----------------------------------------------------------- evaluating, predicting


class Evaluation:
    """One pass over held-out data, as `validation_data` of `fit`."""

    def __init__(
        self,
        path: pathlib.Path,
        data: pathlib.Path,
        options: argparse.Namespace,
        log: Log,
        leaves: Callable[[], bool] = lambda: False,
    ):
        """`leaves` says whether there is no time left to go on."""
        self.log = log
        self._leaves = leaves
        self.program, self.batches = _load(path, data, options, log)
        if self.program.manifest.mode != "evaluate":
            raise ValueError(
                f"--evaluate needs a program that evaluates. Received: {path} of mode "
                f"{self.program.manifest.mode!r}"
            )

    def __call__(self, state: dict[str, Any], step: int) -> dict[str, Any]:
        """Logs the metrics; returns the state without what they counted."""
        begun = time.perf_counter()
        before = {
            tensor.name: state[tensor.name]
            for tensor in self.program.manifest.state
            if tensor.role == "metric"
        }
        state = self.program.reset_metrics(state)
        outputs: dict[str, Any] = {}
        for number in range(len(self.batches)):
            if self._leaves():
                return {**state, **before}
            outputs, state = self.program(self.batches.batch(number), state)
        seconds = time.perf_counter() - begun
        self.log("evaluate", step=step, **numbers(outputs), seconds=seconds)
        return {**state, **before}


def _pass(options: argparse.Namespace, log: Log) -> int:
    arrays, step = _state(options)
    if program_file.read_manifest(options.program).mode == "evaluate":
        evaluation = Evaluation(options.program, options.data, options, log)
        evaluation(evaluation.program.put_state(arrays), step)
        return 0
    if options.out is None:
        raise ValueError("Predicting needs a folder for what it says: --out.")
    program, batches = _load(options.program, options.data, options, log)
    state = program.put_state(arrays)
    said: dict[str, list[np.ndarray]] = {}
    for number in range(len(batches)):
        outputs, state = program(batches.batch(number), state)
        for name, value in outputs.items():
            said.setdefault(name, []).append(np.asarray(value))
    program_file.write_data(
        options.out, {name: np.concatenate(parts) for name, parts in said.items()}
    )
    log("predict", step=step, rows=len(batches) * batches.size)
    return 0


if __name__ == "__main__":
    sys.exit(main())
