"""Soak test: many steps of a small model with checkpoints, in which nothing may grow.

    python -m benchmarks.checkpoint.soak [--steps 21600] [--json]

21600 steps are six hours at one step a second. Memory, threads, open files, files on
the disk and compilations are noted twenty times; what the last quarter has more
than the second is growth.
"""

import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import keras

import gshard_tf
from benchmarks.checkpoint import faulty_run
from benchmarks.harness import memory
from benchmarks.harness.command_line import (
    circumstances,
    make_parser,
    say,
    show,
)
from keras_layers import MoELayer

SAMPLES, STEPS_PER_EPOCH = 20, 240


class _Samples(keras.callbacks.Callback):
    """Notes what could grow, when no checkpoint is being written."""

    def __init__(self, saver: gshard_tf.CheckpointCallback, steps: int):
        super().__init__()
        self.checkpoints = saver.manager
        self.every = max(1, steps // SAMPLES)
        self.step = 0
        self.rows: list[dict[str, int]] = []
        self.compilations = 0
        jax.monitoring.register_event_duration_secs_listener(self._heard)

    def _heard(self, event: str, seconds: float, **_: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            self.compilations += 1

    def on_train_batch_end(self, batch: int, logs: dict | None = None) -> None:
        self.step += 1
        if self.step % self.every:
            return
        self.checkpoints.wait()
        row = {
            "resident_mb": memory.resident() >> 20,
            "threads": len(os.listdir("/proc/self/task")),
            "open_files": len(os.listdir("/proc/self/fd")),
            "files_on_disk": sum(1 for _ in self.checkpoints.directory.rglob("*")),
            "compilations": self.compilations,
        }
        say(f"step {self.step}: {row}")
        self.rows.append(row)


def soak(steps: int, every: int) -> dict[str, Any]:
    """Trains so many steps, with a checkpoint after every `every`th."""
    folder = Path(tempfile.mkdtemp(prefix="soak-"))
    try:
        gshard_tf.request_cpu_devices(4)
        data = faulty_run.data()
        model = faulty_run.model(experts=lambda: MoELayer(num_experts=4, hidden_dim=16))
        saver = gshard_tf.CheckpointCallback(folder, save_every=every, dataset=data)
        samples = _Samples(saver, steps)
        model.fit(
            data.dataset,
            epochs=max(1, steps // STEPS_PER_EPOCH),
            steps_per_epoch=STEPS_PER_EPOCH,
            verbose=0,
            callbacks=[saver, samples, gshard_tf.NonFiniteGuard("skip")],
        )
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    quarter = len(samples.rows) // 4
    parts = samples.rows[quarter : 2 * quarter], samples.rows[-quarter:]
    most = [{k: max(row[k] for row in part) for k in part[0]} for part in parts]
    return {
        "steps": samples.step,
        "second_quarter": most[0],
        "last_quarter": most[1],
        "growth": {k: most[1][k] - most[0][k] for k in most[0]},
    }


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--steps", type=int, default=21600, help="how many (21600)")
    parser.add_argument("--every", type=int, default=100, help="steps per save (100)")
    options = parser.parse_args()
    start = time.perf_counter()
    result = soak(options.steps, options.every)
    show(result | circumstances(start, options.steps < 21600), options.json)


if __name__ == "__main__":
    main()
