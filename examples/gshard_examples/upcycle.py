"""A dense model that becomes a mixture of experts, and goes on from its loss.

    python -m gshard_examples.upcycle

Sparse upcycling (arXiv 2212.05055): every expert starts as a copy of the trained
feed-forward layer, and all other weights as they were. The devices are 8 virtual ones
of the CPU; on GPUs, leave `request_cpu_devices` and `device_type="CPU"` out.
"""

from __future__ import annotations

import os
from pydoc_data.topics import topics

# XLA and TensorFlow log pages otherwise, before and while they compile.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np

import gshard_tf
from keras_layers import (
    FeedForward,
    MoELayer,
    MultiHeadAttention,
    TokenEmbedding,
    TopKRouter,
    upcycle,
)

VOCABULARY, LENGTH, WIDTH, HIDDEN, BLOCKS, EXPERTS = 128, 32, 64, 128, 2, 8
BATCH, DENSE_STEPS, SPARSE_STEPS = 32, 300, 300


def read_windows(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns bytes of Python's `help()`: inputs and labels, [count, LENGTH] each."""
    text = "\n".join(topics[name] for name in sorted(topics))
    ids = np.frombuffer(text.encode("ascii", "replace"), np.uint8).astype("int32")
    starts = np.random.default_rng(seed).integers(0, len(ids) - LENGTH, count)
    windows = ids[starts[:, None] + np.arange(LENGTH + 1)]
    return windows[:, :-1], windows[:, 1:]


def make_model(experts: int | None, learning_rate: float) -> keras.Model:
    """Returns a causal language model, compiled.

    Args:
        experts: Experts in place of each feed-forward layer. None: a dense model.
        learning_rate: Adam's.
    """
    tokens = keras.Input([LENGTH], dtype="int32")
    x = TokenEmbedding(VOCABULARY, WIDTH)(tokens)
    for i in range(BLOCKS):
        normalized = keras.layers.LayerNormalization()(x)
        x = x + MultiHeadAttention(num_heads=4, key_dim=16)(normalized, causal=True)
        normalized = keras.layers.LayerNormalization()(x)
        if experts is None:
            layer = FeedForward(HIDDEN, name=f"feed_forward_{i}")
        else:
            # Weights of two experts that sum to 1, and in evaluation room for all: the
            # conditions under which the mixture computes what the dense layer did.
            router = TopKRouter(experts, k=2, eval_capacity_factor="dropless")
            layer = MoELayer(experts, HIDDEN, router=router, name=f"feed_forward_{i}")
        x = x + layer(normalized)
    x = keras.layers.LayerNormalization()(x)
    model = keras.Model(tokens, keras.layers.Dense(VOCABULARY, name="logits")(x))
    model.compile(
        keras.optimizers.Adam(learning_rate),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    return model


def upcycle_model(dense: keras.Model, sparse: keras.Model) -> None:
    """Copies all weights of `dense`, those of feed-forward layers into each expert."""
    for source, target in zip(dense.layers, sparse.layers, strict=True):
        if isinstance(target, MoELayer):
            upcycle(source, target, noise=0.01)
        else:
            target.set_weights(source.get_weights())


def main(
    dense_steps: int = DENSE_STEPS, sparse_steps: int = SPARSE_STEPS
) -> dict[str, float]:
    """Trains the dense model, upcycles it, and trains both further.

    Args:
        dense_steps: Batches of the dense model before it is upcycled.
        sparse_steps: Batches of the mixture, and of the dense model after that.

    Returns:
        The loss on other texts, in nats a byte: `dense` when it is upcycled, `upcycled`
        before its first step, `sparse` in the end, and `dense_longer`, of the dense
        model that was trained for as many steps.
    """
    gshard_tf.request_cpu_devices(8)
    mesh = gshard_tf.create_mesh({"expert": 8}, device_type="CPU")
    strategy = gshard_tf.SpmdStrategy(mesh)
    keras.utils.set_random_seed(0)
    inputs, labels = read_windows((dense_steps + sparse_steps) * BATCH, seed=1)
    first, then = np.split(np.stack([inputs, labels]), [dense_steps * BATCH], axis=1)
    held_out = read_windows(16 * BATCH, seed=2)
    with strategy.scope():
        dense, sparse = make_model(None, 3e-3), make_model(EXPERTS, 1e-3)

    def loss_of(model: keras.Model) -> float:
        scores = model.evaluate(*held_out, BATCH, verbose=0, return_dict=True)
        return scores["loss"]

    dense.fit(*first, BATCH, verbose=2)
    upcycle_model(dense, sparse)
    losses = {"dense": loss_of(dense), "upcycled": loss_of(sparse)}
    sparse.fit(*then, BATCH, verbose=2)
    losses["sparse"] = loss_of(sparse)
    dense.optimizer.learning_rate = 1e-3
    dense.fit(*then, BATCH, verbose=2)
    losses["dense_longer"] = loss_of(dense)
    print("\nLayout of the experts, each a copy of the feed-forward layer at first:")
    for line in str(strategy.describe(sparse)).splitlines():
        if line.startswith(("weight", "feed_forward")):
            print(line)
    print("\nLoss on other texts, in nats a byte:")
    for name, loss in losses.items():
        print(f"{name:13} {loss:.4f}")
    return losses


if __name__ == "__main__":
    main()
