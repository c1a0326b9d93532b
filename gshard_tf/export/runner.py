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
import os
import pathlib
import signal
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

import gshard_tf
from gshard_tf.export import program_file, state_file
from gshard_tf.export.array_dataset import ArrayBatches, write_data
from gshard_tf.export.manifest import PLATFORMS, Manifest
from gshard_tf.export.run_log import Log, scalars
from gshard_tf.io.command_line import Parser, report
from gshard_tf.io.paths import path_option
from gshard_tf.runtime.termination import Termination


def parser() -> argparse.ArgumentParser:
    """Returns the parser of the command line."""
    result = Parser(prog="gshard-run", description=__doc__.split("\n", 1)[0])
    add = result.add_argument
    add("--version", action="version", version=f"%(prog)s {gshard_tf.__version__}")
    add("program", type=path_option, help="file of the step: train, evaluate, predict")
    add("--data", type=path_option, required=True, help="folder of its arrays")
    add("--out", type=path_option, help="folder for log, state and predictions")
    add(
        "--state",
        type=path_option,
        help="state to begin with, unless OUT/state.npz exists; by default "
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
    return result


class Interruption:
    """Context in which Ctrl-C lets the current step end and its state be saved.

    A second one ends the process as usual.

    Attributes:
        reason: The name of the signal that was received, or None.
    """

    def __init__(self) -> None:
        self.reason: str | None = None
        self._previous: Any = None

    def __enter__(self) -> Interruption:
        self._previous = signal.signal(signal.SIGINT, self._on_signal)
        return self

    def __exit__(self, *error: Any) -> None:
        signal.signal(signal.SIGINT, self._previous)

    def _on_signal(self, number: int, frame: Any) -> None:
        self.reason = signal.Signals(number).name
        signal.signal(number, self._previous)


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
        return report("gshard-run", error)


def _start_jax(options: argparse.Namespace, manifest: Manifest) -> None:
    """Chooses the platform, and asks for virtual devices on CPUs."""
    if options.platform:
        os.environ["JAX_PLATFORMS"] = options.platform
    from gshard_tf.runtime.devices import request_cpu_devices

    # Where jax finds other devices, these are not used.
    request_cpu_devices(options.devices or manifest.variants[0].devices)
    import jax

    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:
        # It only asserts where it lacks the plugin of a platform.
        platform = options.platform or os.environ.get("JAX_PLATFORMS") or "any platform"
        raise ValueError(
            f"jax finds no devices of {platform} here. Take another --platform, or "
            f"install the packages that this one needs. Received: {error!r}"
        ) from error


def _state(options: argparse.Namespace) -> tuple[dict[str, np.ndarray], int]:
    """Returns the state to start with, and its number of steps."""
    path = _initial_state(options)
    arrays, meta = state_file.read_state(path)
    return arrays, int(meta.get("step", 0))


def _initial_state(options: argparse.Namespace) -> pathlib.Path:
    if options.out is not None and (options.out / "state.npz").is_file():
        return options.out / "state.npz"
    if options.state is not None:
        return options.state
    name = program_file.read_manifest(options.program).initial_state
    if name is None:
        raise ValueError(
            "The initial state must be named by the program, or by --state. "
            f"Received: --state {options.state}, and {options.program} names none"
        )
    return options.program.parent / name


# ------------------------------------------------------------------------ training


def _train(options: argparse.Namespace, log: Log) -> int:
    if options.steps is None and options.time_limit is None:
        raise ValueError(
            "Training needs an end: --steps, --time-limit or both. Received: neither"
        )
    if options.out is None:
        raise ValueError("Training needs a folder for its state: --out. Received: none")
    if not options.grace > 0:
        raise ValueError(f"--grace must be more than 0 s. Received: {options.grace}")
    start = time.perf_counter()
    arrays, step = _state(options)
    if _initial_state(options) == options.out / "state.npz" and _end(
        options, step, 0.0
    ):
        log("end", reason="steps", step=step, seconds=0.0)
        return 0
    program, batches = _load(options.program, options.data, options, log)
    evaluation, saved = None, -1
    termination = Termination(
        options.grace, lambda frame: True, lambda: f"Step {saved} was saved last."
    )
    if options.evaluate:
        path, data = options.evaluate
        evaluation = Evaluation(
            path, data, options, log, lambda: termination.is_requested
        )
    state = program.put_state(arrays)
    since, last = time.perf_counter(), step
    previous: Any = None

    def save() -> None:
        _save(options.out, state, step, log)

    with Interruption() as interruption, termination:
        while True:
            reason = interruption.reason or _end(
                options, step, time.perf_counter() - start
            )
            if not reason and not termination.may_begin():
                reason = "SIGTERM"
            if reason:
                break
            outputs, state = program(batches.batch(step), state)
            step += 1
            # One step runs while the next one is prepared, and no more: the time limit
            # would not count them.
            _wait(previous)
            previous = outputs
            if step % options.log_every == 0:
                metrics, now = scalars(outputs), time.perf_counter()
                pace = (now - since) / (step - last)
                log("train", step=step, **metrics, seconds_per_step=pace)
                since, last = now, step
                # As Keras does at each epoch: a logged value is the mean since then.
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
        log("end", reason=reason, step=step, seconds=time.perf_counter() - start)
        if reason == "SIGTERM":
            termination.leave(f"the run is saved at step {step}.")
    return 0


def _end(options: argparse.Namespace, step: int, seconds: float) -> str | None:
    """Returns the reason to stop, or None."""
    if options.steps is not None and step >= options.steps:
        return "steps"
    if options.time_limit is not None and seconds >= options.time_limit:
        return "time"
    return None


def _load(
    path: pathlib.Path, data: pathlib.Path, options: argparse.Namespace, log: Log
) -> tuple[Any, ArrayBatches]:
    from gshard_tf.export.loader import load

    start = time.perf_counter()
    program = load(path, options.devices)
    training = program.manifest.mode == "train"
    batches = ArrayBatches(
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
        seconds=time.perf_counter() - start,
    )
    return program, batches


def _save(out: pathlib.Path, state: dict[str, Any], step: int, log: Log) -> None:
    start = time.perf_counter()
    arrays = {name: np.asarray(value) for name, value in state.items()}
    state_file.write_state(out / "state.npz", arrays, step=step)
    log("save", step=step, seconds=time.perf_counter() - start)


def _wait(outputs: Any) -> None:
    import jax

    jax.block_until_ready(outputs)


# ----------------------------------------------------------- evaluating, predicting


class Evaluation:
    """One pass over held-out data, as with `validation_data` of `fit`."""

    def __init__(
        self,
        path: pathlib.Path,
        data: pathlib.Path,
        options: argparse.Namespace,
        log: Log,
        must_stop: Callable[[], bool] = lambda: False,
    ):
        """`must_stop` returns whether the process must end now."""
        self.log = log
        self._must_stop = must_stop
        self.program, self.batches = _load(path, data, options, log)
        if self.program.manifest.mode != "evaluate":
            raise ValueError(
                "--evaluate needs a program of mode 'evaluate'. "
                f"Received: {path} of mode "
                f"{self.program.manifest.mode!r}"
            )

    def __call__(self, state: dict[str, Any], step: int) -> dict[str, Any]:
        """Logs the metrics of a pass; returns the state with its metrics as before."""
        start = time.perf_counter()
        before = {
            tensor.name: state[tensor.name]
            for tensor in self.program.manifest.state
            if tensor.role == "metric"
        }
        state = self.program.reset_metrics(state)
        outputs: dict[str, Any] = {}
        for number in range(len(self.batches)):
            if self._must_stop():
                return {**state, **before}
            outputs, state = self.program(self.batches.batch(number), state)
        seconds = time.perf_counter() - start
        self.log("evaluate", step=step, **scalars(outputs), seconds=seconds)
        return {**state, **before}


def _pass(options: argparse.Namespace, log: Log) -> int:
    arrays, step = _state(options)
    if program_file.read_manifest(options.program).mode == "evaluate":
        evaluation = Evaluation(options.program, options.data, options, log)
        evaluation(evaluation.program.put_state(arrays), step)
        return 0
    if options.out is None:
        raise ValueError(
            "Predicting needs a folder for its outputs: --out. Received: none"
        )
    program, batches = _load(options.program, options.data, options, log)
    state = program.put_state(arrays)
    predictions: dict[str, list[np.ndarray]] = {}
    for number in range(len(batches)):
        outputs, state = program(batches.batch(number), state)
        for name, value in outputs.items():
            predictions.setdefault(name, []).append(np.asarray(value))
    write_data(
        options.out,
        {name: np.concatenate(parts) for name, parts in predictions.items()},
    )
    log("predict", step=step, rows=len(batches) * batches.size)
    return 0


if __name__ == "__main__":
    sys.exit(main())
