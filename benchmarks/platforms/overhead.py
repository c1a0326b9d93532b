"""The overhead of `fit` per step, on a stand-in device whose steps have a fixed length.

It begins a step when it is told to and the one before has ended; results can be read
once their step has ended. The time for which it has nothing to do between two steps is
what the host adds. Other programs on the machine add to it, but not to the second
measure, the CPU time of a step of `fit`, beside that of plain Keras.
"""

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import keras
import numpy as np
import tensorflow as tf

import gshard_tf
from benchmarks.harness.command_line import say
from gshard_tf.spmd.program import SpmdProgram

STEP_SECONDS = 0.02


class Result:
    """A result that can be read from a certain time on."""

    def __init__(self, value: Any, ready_at: float):
        self._value, self._ready_at = value, ready_at
        self.shape, self.dtype = value.shape, value.dtype

    def is_ready(self) -> bool:
        return time.perf_counter() >= self._ready_at

    def block_until_ready(self) -> "Result":
        time.sleep(max(0.0, self._ready_at - time.perf_counter()))
        return self

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        self.block_until_ready()
        return np.asarray(self._value)


class Device:
    """Runs the real program of each step, and is then busy for `STEP_SECONDS`."""

    def __init__(self) -> None:
        self.gaps: list[float] = []
        self._busy_until = 0.0

    @contextmanager
    def runs_steps(self) -> Iterator[None]:
        run = SpmdProgram.__call__

        def start(program: SpmdProgram, inputs: Any, captures: Any) -> Any:
            outputs, updated = run(program, inputs, captures)
            now = time.perf_counter()
            self.gaps.append(max(0.0, now - self._busy_until))
            self._busy_until = max(now, self._busy_until) + STEP_SECONDS
            return [Result(each, self._busy_until) for each in outputs], updated

        SpmdProgram.__call__ = start  # type: ignore[method-assign]
        try:
            yield
        finally:
            SpmdProgram.__call__ = run  # type: ignore[method-assign]


def _model(steps_per_execution: int, on_mesh: bool = True) -> keras.Model:
    strategy = tf.distribute.get_strategy()
    if on_mesh:
        strategy = gshard_tf.SpmdStrategy(gshard_tf.create_mesh({"x": 1}))
    with strategy.scope():
        model = keras.Sequential([keras.layers.Input([8]), keras.layers.Dense(8)])
        model.compile("adam", "mse", steps_per_execution=steps_per_execution)
    return model


def cpu_per_step(steps: int = 400, rounds: int = 7) -> dict[str, float]:
    """Returns the milliseconds of CPU time that a step of `fit` takes, all of it.

    Args:
        steps: The number of steps of an epoch.
        rounds: How many epochs each side trains, in turns; the median counts.
    """
    models = {"mesh": _model(1), "plain_keras": _model(1, on_mesh=False)}
    x = np.zeros([16 * steps, 8], "float32")
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for i in range(rounds + 1):
        for name, model in models.items():
            start = time.process_time()
            model.fit(x, x, batch_size=16, verbose=0)
            if i:  # the first one compiles
                seconds[name].append((time.process_time() - start) / steps)
    return {n: round(1e3 * statistics.median(s), 3) for n, s in seconds.items()}


def overhead(steps: int = 96, rounds: int = 5) -> dict[str, float]:
    """Returns the milliseconds per step for which the device has nothing to do.

    Args:
        steps: The number of steps of an epoch.
        rounds: How many epochs each side trains, in turns. Of each, the mean over its
            executions but the first counts; of these, the median.
    """
    device, models = Device(), {k: _model(k) for k in (1, 8, 32)}
    x = np.zeros([16 * steps, 8], "float32")
    means: dict[int, list[float]] = {k: [] for k in models}
    with device.runs_steps():
        for i in range(rounds + 1):
            for k, model in models.items():
                device.gaps.clear()
                model.fit(x, x, batch_size=16, verbose=0)
                if i:  # the first one compiles
                    means[k].append(statistics.mean(device.gaps[k:]))
            say(f"overhead, round {i}: { {k: m[-1:] for k, m in means.items()} }")
    return {
        "step_ms": 1e3 * STEP_SECONDS,
        **{
            f"steps_per_execution={k}": round(1e3 * statistics.median(m), 3)
            for k, m in means.items()
        },
    }
