# %% [markdown]
"""# Quick start: a Mixture-of-Experts language model on 8 devices, stopped and resumed

The devices are virtual ones of the CPU; on GPUs, leave `request_cpu_devices` and
`device_type="CPU"` out. The run takes about a minute on a laptop. As a script it is
`python -m gshard_examples.quickstart`.
"""

# %% tags=["active-ipynb"]
# from importlib.util import find_spec
#
# if find_spec("gshard_tf") is None:  # a checkout, or a wheel of it
#     %pip install -q ../..

# %%
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


# %% [markdown]
# ## Data
# The best loss is log(4) = 1.39; a model that knows nothing has log(64) = 4.16.
# %%
def synthetic_text(sentences: int = 2048, seed: int = 0) -> np.ndarray:
    """Returns ids [sentences, LENGTH + 1], each with four possible successors."""
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


# %% [markdown]
# ## Model
# Nothing here speaks of devices: layers have named the dimensions of their weights.
# %%
def make_model() -> keras.Model:
    """Returns a small causal language model, compiled."""
    tokens = keras.Input([LENGTH], dtype="int32")
    x = TokenEmbedding(VOCABULARY, WIDTH)(tokens)
    x = x + MultiHeadAttention(num_heads=4, key_dim=16)(x, causal=True)
    normalized = keras.layers.LayerNormalization()(x)
    x = x + MoELayer(EXPERTS, hidden_dim=128, name="moe")(normalized)
    logits = keras.layers.Dense(VOCABULARY)(keras.layers.LayerNormalization()(x))
    model = keras.Model(tokens, logits)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(3e-3), loss)
    return model


# %% [markdown]
# ## Training
# `CheckpointCallback` saves weights, optimizer, seeds and the position in the data.
# %%
def train(
    strategy: gshard_tf.SpmdStrategy,
    directory: Path,
    steps_per_epoch: int,
    stop_at: int | None = None,
) -> tuple[keras.Model, int, list[float]]:
    """Trains the run in `directory`: from its last checkpoint, if it has one.

    Returns:
        The model, the step that it began at, and the loss of each epoch that it ended.
    """
    keras.utils.set_random_seed(0)
    with strategy.scope():
        model = make_model()
    dataset = make_dataset()
    checkpoint = gshard_tf.CheckpointCallback(
        directory, save_every=max(1, steps_per_epoch // 5), dataset=dataset
    )

    def stop(batch: int, logs: dict | None = None) -> None:
        if stop_at is not None and model.optimizer.iterations.numpy() == stop_at:
            raise KeyboardInterrupt  # as Ctrl-C does

    stopper = keras.callbacks.LambdaCallback(on_train_batch_end=stop)
    expected = [] if stop_at is None else [KeyboardInterrupt]  # not a user's Ctrl-C
    with contextlib.suppress(*expected):
        model.fit(
            dataset.dataset,
            epochs=EPOCHS,
            steps_per_epoch=steps_per_epoch,
            shuffle=False,  # the dataset is shuffled
            callbacks=[checkpoint, stopper],
            verbose=2,
        )
    start = checkpoint.restored.manifest.step if checkpoint.restored else 0
    return model, start, model.history.history["loss"]


def make_strategy() -> gshard_tf.SpmdStrategy:
    """Returns a strategy over 8 devices."""
    gshard_tf.request_cpu_devices(8)
    return gshard_tf.SpmdStrategy(gshard_tf.create_mesh({"expert": 8}, "CPU"))


def main(steps_per_epoch: int = STEPS_PER_EPOCH) -> list[float]:
    """Stops a run in its third epoch, resumes it, and returns the losses since then."""
    strategy = make_strategy()
    stop_at = 2 * steps_per_epoch + steps_per_epoch // 2
    with tempfile.TemporaryDirectory() as directory:
        train(strategy, Path(directory), steps_per_epoch, stop_at)
        print(f"\nStopped after step {stop_at}. The same call resumes the run:\n")
        model, start, losses = train(strategy, Path(directory), steps_per_epoch)
    print(f"\nLayout of each variable:\n{strategy.describe(model)}")
    print(f"\nResumed at step {start}, trained to {EPOCHS * steps_per_epoch}.")
    return losses


# %% tags=["active-py"]
if __name__ == "__main__":
    main()

# %% [markdown]
# ## A run, stopped in its third epoch
# %% tags=["active-ipynb"]
# strategy, directory = make_strategy(), Path(tempfile.mkdtemp())
# _ = train(strategy, directory, STEPS_PER_EPOCH, stop_at=5 * STEPS_PER_EPOCH // 2)
# %% [markdown]
# The same call resumes it, at the last checkpoint and with the batch that comes next.
# %% tags=["active-ipynb"]
# model, start, losses = train(strategy, directory, STEPS_PER_EPOCH)
# strategy.describe(model)  # Each device holds an eighth of the experts.
