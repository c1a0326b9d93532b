"""The run that `faults` kills: small, seeded, on four virtual devices."""

import hashlib
import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

import gshard_tf
from gshard_tf.callbacks import checkpoint as _callback  # loaded before the forks
from keras_layers import Dropout

EVERY = 6
STEPS_PER_EPOCH = 25
_ = _callback


def data() -> gshard_tf.ResumableDataset:
    # The order of shuffling depends on it, too.
    keras.utils.set_random_seed(3)
    rng = np.random.default_rng(0)
    x = rng.normal(size=[512, 8, 8]).astype("float32")
    dataset = tf.data.Dataset.from_tensor_slices((x, x[..., :1]))
    return gshard_tf.ResumableDataset(
        dataset.shuffle(100, seed=1).repeat().batch(16).prefetch(2)
    )


class Experts(keras.layers.Layer):
    """`[B, E, M]` -> the same: row `e` goes to expert `e`.

    What a checkpoint sees of a mixture of experts, and a fifth of its tracing: a life
    is mostly that.
    """

    def build(self, shape: Sequence[int]) -> None:
        _, e, m = shape
        self.wi = self.add_weight(shape=(e, m, m), name="wi")
        self.wo = self.add_weight(shape=(e, m, m), name="wo")
        for weight in (self.wi, self.wo):
            gshard_tf.name_axes(weight, ("expert", "embed", "mlp"))

    def call(self, x: tf.Tensor) -> tf.Tensor:
        h = tf.tanh(tf.einsum("bem,emh->beh", x, self.wi))
        return tf.einsum("beh,ehm->bem", h, self.wo)


def model(
    width: int = 8, experts: Callable[[], keras.layers.Layer] = Experts
) -> keras.Model:
    keras.utils.set_random_seed(3)
    strategy = gshard_tf.SpmdStrategy(gshard_tf.create_mesh({"expert": 4}))
    with strategy.scope():
        x = inputs = keras.Input((8, width))
        x = x + experts()(x)
        x = Dropout(0.1)(x)
        keras_model = keras.Model(inputs, keras.layers.Dense(1)(x))
        keras_model.compile("adam", "mse")
    return keras_model


def digest(keras_model: keras.Model) -> str:
    """Returns a digest of every bit of a run's state."""
    sha256 = hashlib.sha256()
    for name, variable in sorted(gshard_tf.training_state(keras_model).items()):
        sha256.update(name.encode())
        sha256.update(variable.numpy().tobytes())
    return sha256.hexdigest()


class Trace(keras.callbacks.Callback):
    """Appends the loss of every step to a file, to the bit, and reports it."""

    def __init__(self, path: Path, saver: Any, report: Callable[[str], None]):
        super().__init__()
        self.path = path
        self.saver = saver
        self.report = report

    def on_train_begin(self, logs: dict | None = None) -> None:
        self.file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        restored = self.saver.restored
        self.report(f"restored {restored.manifest.step if restored else 0}")

    def on_train_batch_end(self, batch: int, logs: dict | None = None) -> None:
        line = f"{self.saver.step} {float(logs['loss']).hex()}\n"
        os.write(self.file, line.encode())
        self.report(f"step {self.saver.step}")


class _Reporting(gshard_tf.CheckpointManager):
    """Reports when it begins to write."""

    report: Callable[[str], None]

    def _write(self, manifest: Any, *args: Any) -> None:
        self.report(f"saving {manifest.step}")
        super()._write(manifest, *args)
        self.report(f"saved {manifest.step}")


def run(folder: Path, epochs: int, report: Callable[[str], None]) -> str:
    """Begins or resumes the run in `folder`; returns its digest."""
    warnings.filterwarnings("ignore", message=".*shuffle=True.*")
    folder.mkdir(parents=True, exist_ok=True)
    gshard_tf.request_cpu_devices(4)
    checkpoints = _Reporting(folder / "checkpoints", max_to_keep=3)
    checkpoints.report = report
    feed = data()
    keras_model = model()
    saver = gshard_tf.CheckpointCallback(checkpoints, save_every=EVERY, dataset=feed)
    keras_model.fit(
        feed.dataset,
        epochs=epochs,
        steps_per_epoch=STEPS_PER_EPOCH,
        verbose=0,
        callbacks=[saver, Trace(folder / "losses.txt", saver, report)],
    )
    return digest(keras_model)
