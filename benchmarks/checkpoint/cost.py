"""Cost of saving and restoring a model of two gigabytes.

    python -m benchmarks.checkpoint.cost [--gigabytes 2.1] [--json]

A mixture of experts on four virtual devices. Measured:

* steps with and without a save under way (they take turns); how long `save` holds up
  the step; the time until the checkpoint is published; peak memory, over that of the
  same steps without a save;
* seconds per gigabyte, and peak memory over that before, of saving and of restoring,
  beside Keras's `.weights.h5` and `tf.train.Checkpoint`, whose files are flushed to the
  disk too. Each restore is in a process of its own.

Memory is in sizes of the state: one shard set, as one process has all of it.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import keras
import numpy as np
import tensorflow as tf

import gshard_tf
from benchmarks.harness import memory
from benchmarks.harness.command_line import (
    circumstances,
    make_parser,
    say,
    show,
)
from gshard_tf.checkpoints.snapshot import snapshot
from keras_layers import MoELayer

DEVICES, WIDTH, HIDDEN, LENGTH, BATCH = 4, 1024, 4096, 64, 8
FORMATS = ("gshard_tf", "weights.h5", "tf.train.Checkpoint")


def make(gigabytes: float) -> keras.Model:
    """A model with about so many bytes of weights, and nothing else worth saving."""
    keras.utils.set_random_seed(0)
    experts = round(gigabytes * 1e9 / (8 * WIDTH * HIDDEN) / DEVICES) * DEVICES
    strategy = gshard_tf.SpmdStrategy(gshard_tf.create_mesh({"expert": DEVICES}))
    with strategy.scope():
        x = inputs = keras.Input((LENGTH, WIDTH))
        x = x + MoELayer(num_experts=experts, hidden_dim=HIDDEN)(x)
        model = keras.Model(inputs, keras.layers.Dense(1)(x))
        model.compile(keras.optimizers.SGD(1e-3), "mse")
        model.optimizer.build(model.trainable_variables)
    return model


def batch() -> tuple[np.ndarray, np.ndarray]:
    x = np.random.default_rng(0).normal(size=[BATCH, LENGTH, WIDTH]).astype("float32")
    return x, x[..., :1]


def writer(name: str, model: keras.Model, folder: Path) -> Callable[[], Any]:
    """Returns a function that saves a model in a format, flushed to the disk."""
    if name == "gshard_tf":
        checkpoints = gshard_tf.CheckpointManager(
            folder / name, max_to_keep=1, asynchronous=False
        )
        state = gshard_tf.training_state(model)
        return lambda: checkpoints.save(state, step=1)
    if name == "weights.h5":

        def save() -> None:
            model.save_weights(folder / "model.weights.h5")
            _flush([folder / "model.weights.h5"])

        return save
    checkpoint = tf.train.Checkpoint(model=model, optimizer=model.optimizer)

    def write() -> None:
        checkpoint.write(str(folder / "tf" / "ckpt"))
        _flush(list((folder / "tf").iterdir()))

    return write


def reader(name: str, model: keras.Model, folder: Path) -> Callable[[], Any]:
    """Returns a function that restores what `writer` saved."""
    if name == "gshard_tf":
        checkpoints = gshard_tf.CheckpointManager(folder / name)
        return lambda: checkpoints.restore(gshard_tf.training_state(model))
    if name == "weights.h5":
        return lambda: model.load_weights(folder / "model.weights.h5")
    checkpoint = tf.train.Checkpoint(model=model, optimizer=model.optimizer)
    return lambda: checkpoint.read(str(folder / "tf" / "ckpt")).expect_partial()


def _flush(paths: list[Path]) -> None:
    for path in paths:
        with open(path, "rb") as file:
            os.fsync(file.fileno())


def measured(call: Callable[[], Any]) -> tuple[float, int]:
    """Seconds of a call, and the most memory over that before it."""
    before = memory.resident()
    memory.reset_peak()
    start = time.perf_counter()
    call()
    return time.perf_counter() - start, memory.peak() - before


def while_saving(
    model: keras.Model, folder: Path, size: int, rounds: int, steps: int
) -> dict[str, Any]:
    """Compares steps during a save with steps without one."""
    checkpoints = gshard_tf.CheckpointManager(folder / "beside", max_to_keep=1)
    state = gshard_tf.training_state(model)
    data = tf.data.Dataset.from_tensors(batch()).repeat()
    model.fit(data, steps_per_epoch=3, verbose=0)
    plain, busy, held_up, published, stretches = [], [], [], [], []
    peaks, peaks_alone = [], []
    for i in range(rounds):
        alone = _Times(checkpoints)
        memory.reset_peak()
        model.fit(data, steps_per_epoch=steps, verbose=0, callbacks=[alone])
        peaks_alone.append(memory.peak())
        plain += alone.seconds
        memory.reset_peak()
        start = time.perf_counter()
        checkpoints.save(state, step=i + 1)
        held_up.append(time.perf_counter() - start)
        beside = _Times(checkpoints)
        model.fit(data, steps_per_epoch=steps, verbose=0, callbacks=[beside])
        checkpoints.wait()
        published.append((beside.published or time.perf_counter()) - start)
        peaks.append(memory.peak())
        busy += beside.while_writing
        stretches.append((held_up[-1] + sum(beside.seconds)) / sum(alone.seconds))
        say(f"round {i}: held up {held_up[-1]:.2f} s, published {published[-1]:.1f} s")
    checkpoints.close()
    shutil.rmtree(folder / "beside")
    # Into memory that this process has never had, and into what it has just let go.
    copying = []
    for _ in range(4):
        start = time.perf_counter()
        snapshot(state, is_chief=True)
        copying.append(time.perf_counter() - start)
    return {
        "step_s": statistics.median(plain),
        "step_while_writing_s": statistics.median(busy),
        "steps_while_writing": len(busy),
        "overhead_while_writing": statistics.median(busy) / statistics.median(plain)
        - 1,
        "held_up_s": statistics.median(held_up),
        "copies_one_after_the_other_s": copying,
        "published_after_s": statistics.median(published),
        "steps_per_save": steps,
        "overhead_of_a_save_in_these_steps": statistics.median(stretches) - 1,
        # Over that of the same steps without a save.
        "peak_over_shard_set": (max(peaks) - max(peaks_alone)) / size,
    }


class _Times(keras.callbacks.Callback):
    """Seconds of each step, and of those during which a checkpoint was written."""

    def __init__(self, checkpoints: gshard_tf.CheckpointManager):
        super().__init__()
        self.checkpoints = checkpoints
        self.seconds: list[float] = []
        self.while_writing: list[float] = []
        self.published: float | None = None

    def on_train_batch_begin(self, batch: int, logs: dict | None = None) -> None:
        self.start = time.perf_counter()

    def on_train_batch_end(self, batch: int, logs: dict | None = None) -> None:
        now = time.perf_counter()
        self.seconds.append(now - self.start)
        if self.checkpoints.is_writing:
            self.while_writing.append(now - self.start)
        elif self.published is None:
            self.published = now


def restore_apart(name: str, folder: Path, gigabytes: float) -> dict[str, float]:
    """Restores in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.checkpoint.cost"]
    command += ["--gigabytes", str(gigabytes), "--restore", name, str(folder)]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
    return json.loads(done.stdout)


def compare(gigabytes: float, rounds: int, steps: int) -> dict[str, Any]:
    folder = Path(tempfile.mkdtemp(prefix="checkpoint-"))
    (folder / "tf").mkdir()
    try:
        model = make(gigabytes)
        state = gshard_tf.training_state(model)
        size = sum(int(np.prod(v.shape)) * v.value.dtype.size for v in state.values())
        say(f"{size / 1e9:.2f} GB of state")
        result: dict[str, Any] = {"gigabytes": size / 1e9}
        result |= while_saving(model, folder, size, rounds, steps)
        saved = {}
        for name in FORMATS:
            # The step left the state on the devices; all of them begin from there.
            model.train_on_batch(*batch())
            seconds, peak = measured(writer(name, model, folder))
            saved[name] = {"save_s_per_gb": seconds / size * 1e9}
            saved[name]["save_peak_over_shard_set"] = peak / size
            say(f"{name}: {saved[name]}")
        del model, state
        keras.backend.clear_session()
        for name in FORMATS:
            restored = restore_apart(name, folder, gigabytes)
            saved[name]["restore_s_per_gb"] = restored["seconds"] / size * 1e9
            saved[name]["restore_peak_over_shard_set"] = restored["peak"] / size
            say(f"{name}: {saved[name]}")
        return result | {"formats": saved}
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--gigabytes", type=float, default=2.1, help="of state (2.1)")
    parser.add_argument("--rounds", type=int, default=3, help="saves in training (3)")
    parser.add_argument("--steps", type=int, default=10, help="between saves (10)")
    parser.add_argument("--restore", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    gshard_tf.request_cpu_devices(DEVICES)
    if options.restore:
        name, folder = options.restore
        model = make(options.gigabytes)
        jax.devices()  # XLA's own memory is not that of restoring
        seconds, peak = measured(reader(name, model, Path(folder)))
        print(json.dumps({"seconds": seconds, "peak": peak}))
        return
    start = time.perf_counter()
    result = compare(options.gigabytes, options.rounds, options.steps)
    show(result | circumstances(start, options.gigabytes < 2), options.json)


if __name__ == "__main__":
    main()
