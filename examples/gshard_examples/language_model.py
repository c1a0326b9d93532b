"""A decoder-only mixture-of-experts language model on Python's own documentation.

    python -m gshard_examples.language_model

Tokens are bytes, and the text is that of Python's `help()`: nothing is downloaded. The
model trains on 8 devices, each of which holds one expert of every block, and continues
a text. The devices are virtual ones of the CPU; on GPUs, leave `request_cpu_devices`
and `device_type="CPU"` out.
"""

from __future__ import annotations

import os
from pydoc_data.topics import topics

# XLA and TensorFlow log pages otherwise, before and while they compile.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import tensorflow as tf

import gshard_tf
from keras_layers import MoELayer, MultiHeadAttention, TokenEmbedding, TopKRouter

VOCABULARY = 256
LENGTH, WIDTH, HIDDEN, BLOCKS, EXPERTS, BATCH = 64, 96, 192, 2, 8, 32
STEPS, PROMPT, CONTINUATION = 600, "The statement is ", 200


def read_text() -> np.ndarray:
    """Returns the bytes of all topics of `help()`, some 700 thousand."""
    text = "\n".join(topics[name] for name in sorted(topics))
    return np.frombuffer(text.encode(), np.uint8).astype("int32")


def cut_windows(
    text: np.ndarray, count: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Returns inputs and labels, [count, LENGTH] each, from places drawn at random."""
    starts = np.random.default_rng(seed).integers(0, len(text) - LENGTH, count)
    windows = text[starts[:, None] + np.arange(LENGTH + 1)]
    return windows[:, :-1], windows[:, 1:]


def make_model() -> keras.Model:
    """Returns a causal language model, compiled."""
    tokens = keras.Input([LENGTH], dtype="int32")
    positions = keras.ops.cumsum(keras.ops.ones_like(tokens), axis=1) - 1
    x = TokenEmbedding(VOCABULARY, WIDTH)(tokens)
    x = x + keras.layers.Embedding(LENGTH, WIDTH, name="positions")(positions)
    for i in range(BLOCKS):
        normalized = keras.layers.LayerNormalization()(x)
        x = x + MultiHeadAttention(num_heads=4, key_dim=24)(normalized, causal=True)
        normalized = keras.layers.LayerNormalization()(x)
        # In evaluation no token is dropped, so none depends on those after it.
        router = TopKRouter(EXPERTS, k=2, eval_capacity_factor="dropless")
        x = x + MoELayer(EXPERTS, HIDDEN, router=router, name=f"moe_{i}")(normalized)
    x = keras.layers.LayerNormalization()(x)
    model = keras.Model(tokens, keras.layers.Dense(VOCABULARY, name="logits")(x))
    model.compile(
        keras.optimizers.Adam(3e-3),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    return model


def continue_text(
    model: keras.Model, prompt: str, count: int, temperature: float = 0.7
) -> str:
    """Returns the prompt and bytes drawn one after the other.

    Args:
        model: From `make_model`.
        prompt: A text of at least one byte.
        count: Number of bytes to draw.
        temperature: Divisor of the logits: below 1, likely bytes are likelier still.
    """
    random = np.random.default_rng(0)
    ids = list(prompt.encode())
    for _ in range(count):
        window = ids[-LENGTH:]
        # No token sees the zeros behind it.
        row = np.array([window + [0] * (LENGTH - len(window))], "int32")
        logits = model.predict_on_batch(row)[0, len(window) - 1] / temperature
        probabilities = np.exp(logits.astype("float64") - logits.max())
        probabilities /= probabilities.sum()
        ids.append(int(random.choice(VOCABULARY, p=probabilities)))
    return bytes(ids).decode("utf-8", "replace")


def main(steps: int = STEPS, continuation: int = CONTINUATION) -> dict[str, list]:
    """Trains, shows the layouts, and continues a text.

    Args:
        steps: Number of batches.
        continuation: Number of bytes to draw.

    Returns:
        `loss` and `val_loss` of each fifth of the steps, in nats a byte.
    """
    gshard_tf.request_cpu_devices(8)
    mesh = gshard_tf.create_mesh({"expert": 8}, device_type="CPU")
    strategy = gshard_tf.SpmdStrategy(mesh)
    keras.utils.set_random_seed(0)
    text = read_text()
    split = len(text) * 9 // 10
    epochs = min(5, steps)
    inputs, labels = cut_windows(text[:split], steps // epochs * epochs * BATCH, seed=1)
    with strategy.scope():
        model = make_model()
    history = model.fit(
        tf.data.Dataset.from_tensor_slices((inputs, labels)).batch(BATCH).repeat(),
        epochs=epochs,
        steps_per_epoch=steps // epochs,
        validation_data=cut_windows(text[split:], 8 * BATCH, seed=2),
        validation_batch_size=BATCH,
        verbose=2,
    )
    print("\nLayout of the experts, and of what is around them:")
    for line in str(strategy.describe(model)).splitlines():
        if line.startswith(("weight", "token_embedding", "moe_0", "logits")):
            print(line)
    print("\nA continuation:\n")
    print(continue_text(model, PROMPT, continuation))
    return history.history


if __name__ == "__main__":
    main()
