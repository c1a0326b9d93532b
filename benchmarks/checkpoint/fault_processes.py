"""SIGTERM to runs of one process and of several, and what is lost: no step.

Called by `benchmarks.checkpoint.faults --processes`. A run of small replicated weights,
of which all processes but the first have nothing to write, gets a SIGTERM at a random
moment of its training, in one of its processes or in all, and is given again.
"""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.checkpoint import faulty_run

# How many processes, and whether all of them get the signal.
KINDS = ((1, True), (2, False), (2, True), (4, False), (4, True))
STEPS_PER_EPOCH, EPOCHS = 20, 2
# Before the signal comes: so many steps, to be sure that it trains.
FIRST_STEPS = 3
_MODULE = "benchmarks.checkpoint.fault_processes"
_ROOT = Path(__file__).resolve().parents[2]


def sigterm(folder: Path, seed: int) -> dict[str, dict[str, Any]]:
    """Each kind of run, ended by SIGTERM and given again.

    Returns:
        By kind: exit codes, seconds from the signal to the end of the last process,
        steps lost (done before the signal and trained again, or never), and the losses
        that differ from a run that nobody stopped.
    """
    rng = random.Random(seed)  # noqa: S311
    results, truths = {}, {}
    for count, every in KINDS:
        if count not in truths:
            whole = _Run(folder / f"whole-{count}", count)
            if any(whole.wait()):
                raise RuntimeError(f"A run failed by itself: {whole.errors()}")
            truths[count] = whole.losses()
        name = f"{count} processes, SIGTERM to {'all' if every else 'one'}"
        results[name] = _stop_one(folder / f"{count}-{every}", count, every, rng)
        results[name] |= _compare(folder / f"{count}-{every}", truths[count])
    return results


def _stop_one(
    folder: Path, count: int, every: bool, rng: random.Random
) -> dict[str, Any]:
    run = _Run(folder, count)
    stopped = range(count) if every else [rng.randrange(count)]
    while len(run.losses()) < FIRST_STEPS and not run.has_ended():
        time.sleep(0.02)
    time.sleep(rng.uniform(0, 0.3))
    start = time.monotonic()
    for index in stopped:
        run.processes[index].send_signal(signal.SIGTERM)
    codes = run.wait()
    seconds = time.monotonic() - start
    stopped_at = len(run.losses())
    again = _Run(folder, count)
    return {
        "exit_codes": codes,
        "seconds": seconds,
        "stopped_at": stopped_at,
        "exit_codes_again": again.wait(),
    }


def _compare(folder: Path, truth: list[list[str]]) -> dict[str, Any]:
    lines = _losses(folder)
    steps = [step for step, _ in lines]
    missing = {step for step, _ in truth} - {*steps}
    return {
        "steps_lost": len(steps) - len({*steps}) + len(missing),
        "losses_that_differ": sum(line not in truth for line in lines),
    }


def _losses(folder: Path) -> list[list[str]]:
    path = folder / "losses.txt"
    if not path.exists():
        return []
    return [line.split() for line in path.read_text().splitlines()]


class _Run:
    """The processes of one life of a run."""

    def __init__(self, folder: Path, count: int):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        environment = os.environ | {
            "PYTHONPATH": str(_ROOT),
            "GSHARD_COORDINATOR": f"127.0.0.1:{port}",
            "GSHARD_PROCESSES": str(count),
        }
        self.processes = []
        for index in range(count):
            with open(folder / f"errors-{index}.txt", "w") as errors:
                self.processes.append(
                    subprocess.Popen(  # noqa: S603
                        [
                            sys.executable,
                            "-m",
                            "benchmarks.checkpoint.fault_processes",
                            folder,
                        ],
                        env=environment | {"GSHARD_PROCESS": str(index)},
                        stdout=subprocess.DEVNULL,
                        stderr=errors,
                    )
                )

    def wait(self, seconds: float = 300) -> list[int]:
        """The exit codes; a process that is there after `seconds` is killed."""
        deadline = time.monotonic() + seconds
        for process in self.processes:
            try:
                process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
        return [process.wait() for process in self.processes]

    def has_ended(self) -> bool:
        return any(process.poll() is not None for process in self.processes)

    def losses(self) -> list[list[str]]:
        return _losses(self.folder)

    def errors(self) -> str:
        paths = sorted(self.folder.glob("errors-*.txt"))
        return json.dumps([path.read_text()[-500:] for path in paths])


def train(folder: Path) -> None:
    """Begins or resumes the run in `folder`: one process of it."""
    import keras
    import numpy as np
    import tensorflow as tf

    import gshard_tf

    gshard_tf.request_cpu_devices(2)
    group = gshard_tf.initialize(step_timeout=120, heartbeat_timeout=30)
    keras.utils.set_random_seed(3)
    x = np.random.default_rng(0).normal(size=[256, 8]).astype("float32")
    dataset = tf.data.Dataset.from_tensor_slices((x, x[:, :1]))
    dataset = dataset.shuffle(100, seed=1).repeat().batch(16)
    data = gshard_tf.ResumableDataset(dataset, position="count")
    mesh = gshard_tf.create_mesh({"data": 2 * group.count})
    with gshard_tf.SpmdStrategy(mesh).scope():
        model = keras.Sequential(
            [keras.layers.Input([8]), keras.layers.Dense(8), keras.layers.Dense(1)]
        )
        model.compile("adam", "mse")
    saver = gshard_tf.CheckpointCallback(folder / "checkpoints", dataset=data)
    trace = faulty_run.Trace(folder / "losses.txt", saver, lambda line: None)
    slow = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda batch, logs: time.sleep(0.05)
    )
    model.fit(
        data.dataset,
        epochs=EPOCHS,
        steps_per_epoch=STEPS_PER_EPOCH,
        validation_data=(x, x[:, :1]),
        validation_batch_size=64,
        verbose=0,
        callbacks=[saver, *([trace] if group.is_chief else []), slow],
    )


if __name__ == "__main__":
    train(Path(sys.argv[1]))
