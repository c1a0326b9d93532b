"""Quick start: a Mixture-of-Experts language model on 8 devices, stopped and resumed.

    python -m gshard_examples.quickstart

The devices are virtual ones of the CPU; on GPUs, leave `request_cpu_devices` and
`device_type="CPU"` out. The run takes about a minute on a laptop.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path

# XLA and TensorFlow log pages otherwise, before and while they compile.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import tensorflow as tf

import gshard_tf
from keras_layers import MoELayer, MultiHeadAttention, TokenEmbedding

VOCABULARY, LENGTH, WIDTH, EXPERTS = 64, 32, 64, 8
STEPS_PER_EPOCH, EPOCHS = 50, 4


def synthetic_text(sentences: int = 2048, seed: int = 0) -> np.ndarray:
    """Returns ids [sentences, LENGTH + 1], where each id has four possible successors.

    A perfect model has a loss of log(4) = 1.39, one that knows nothing log(64) = 4.16.
    """
    random = np.random.default_rng(seed)
    successors = random.integers(0, VOCABULARY, (VOCABULARY, 4))
    ids = [random.integers(0, VOCABULARY, sentences)]
    for _ in range(LENGTH):
        ids.append(successors[ids[-1], random.integers(0, 4, sentences)])
    return np.stack(ids, axis=1).astype("int32")


def make_dataset() -> gshard_tf.ResumableDataset:
    """Returns endless shuffled batches, whose position a checkpoint saves."""
    dataset = tf.data.Dataset.from_tensor_slices(synthetic_text())
    dataset = dataset.shuffle(2048, seed=1).repeat().batch(32, drop_remainder=True)
    dataset = dataset.map(lambda ids: (ids[:, :-1], ids[:, 1:]))
    return gshard_tf.ResumableDataset(dataset)


def make_model() -> keras.Model:
    """Returns a small causal language model, compiled."""
    tokens = keras.Input([LENGTH], dtype="int32")
    x = TokenEmbedding(VOCABULARY, WIDTH)(tokens)
    x = x + MultiHeadAttention(num_heads=4, key_dim=16)(x, causal=True)
    normalized = keras.layers.LayerNormalization()(x)
    x = x + MoELayer(EXPERTS, hidden_dim=128, name="moe")(normalized)
    logits = keras.layers.Dense(VOCABULARY)(keras.layers.LayerNormalization()(x))
    model = keras.Model(tokens, logits)
    model.compile(
        keras.optimizers.Adam(3e-3),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    return model


class StopAtStep(keras.callbacks.Callback):
    """Interrupts `fit` as Ctrl-C does."""

    def __init__(self, step: int):
        super().__init__()
        self.step = step

    def on_train_batch_end(self, batch: int, logs: dict | None = None) -> None:
        if self.model.optimizer.iterations.numpy() == self.step:
            raise KeyboardInterrupt


def train(
    strategy: gshard_tf.SpmdStrategy,
    directory: Path,
    steps_per_epoch: int,
    stop_at: int | None = None,
) -> tuple[int, list[float]]:
    """Trains the run in `directory`: from its last checkpoint, if it has one.

    Returns:
        The step that it began at, and the loss of each epoch that it ended.
    """
    keras.utils.set_random_seed(0)
    with strategy.scope():
        model = make_model()
    dataset = make_dataset()
    checkpoint = gshard_tf.CheckpointCallback(
        directory, save_every=max(1, steps_per_epoch // 5), dataset=dataset
    )
    callbacks = [checkpoint] + ([] if stop_at is None else [StopAtStep(stop_at)])
    history = model.fit(
        dataset.dataset,
        epochs=EPOCHS,
        steps_per_epoch=steps_per_epoch,
        shuffle=False,  # the dataset is shuffled
        callbacks=callbacks,
        verbose=2,
    )
    print(f"\nLayout of each variable:\n{strategy.describe(model)}")
    restored = checkpoint.restored
    return restored.manifest.step if restored else 0, history.history["loss"]


def main(steps_per_epoch: int = STEPS_PER_EPOCH) -> list[float]:
    """Stops a run in the middle of its third epoch, and resumes it.

    Returns:
        The losses of the epochs after the stop.
    """
    gshard_tf.request_cpu_devices(8)
    mesh = gshard_tf.create_mesh({"expert": 8}, device_type="CPU")
    strategy = gshard_tf.SpmdStrategy(mesh)
    stop_at = 2 * steps_per_epoch + steps_per_epoch // 2
    with tempfile.TemporaryDirectory() as directory:
        with contextlib.suppress(KeyboardInterrupt):
            train(strategy, Path(directory), steps_per_epoch, stop_at)
        print(f"\nStopped after step {stop_at}. The same call resumes the run:\n")
        start, losses = train(strategy, Path(directory), steps_per_epoch)
    print(f"\nResumed at step {start}, trained to {EPOCHS * steps_per_epoch}.")
    return losses


if __name__ == "__main__":
    main()
