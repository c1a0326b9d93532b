"""Tensor-parallel fine-tuning of a keras-hub model, whose code knows nothing of meshes.

    pip install -e '.[keras-hub]'
    python -m gshard_examples.tensor_parallel

Path rules split a small Gemma over 8 devices: the batch two ways; heads, hidden layer
and vocabulary four ways (Megatron-LM, arXiv 1909.08053). Its losses are those of plain
Keras on one device. The weights are random, so that nothing is downloaded; make the
model by `GemmaCausalLM.from_preset`, in the scope, to begin with trained ones. The
devices are virtual ones of the CPU; on GPUs, leave `request_cpu_devices` and
`device_type="CPU"` out.
"""

from __future__ import annotations

import contextlib
import os
from pydoc_data.topics import topics

# XLA and TensorFlow log pages otherwise, before and while they compile.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import keras_hub
import numpy as np
import tensorflow as tf

import gshard_tf

VOCABULARY, LENGTH, BATCH, STEPS = 256, 32, 16, 100

# The first product of each pair is split along its outputs and the second along its
# inputs, so that a block sums over devices twice.
RULES = gshard_tf.AxisRules(
    {"batch": "data", "vocab": "model", "heads": "model", "mlp": "model"},
    paths=[
        (r"token_embedding/embeddings", ("vocab", None)),
        (
            r"decoder_block_\d+/attention/(query|key|value)/kernel",
            ("heads", None, None),
        ),
        (r"decoder_block_\d+/attention/attention_output/kernel", ("heads", None, None)),
        (r"decoder_block_\d+/ffw_gating(_2)?/kernel", (None, "mlp")),
        (r"decoder_block_\d+/ffw_linear/kernel", ("mlp", None)),
    ],
)


def read_batches(count: int) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Returns bytes of Python's `help()`: inputs and labels of `count` batches."""
    text = "\n".join(topics[name] for name in sorted(topics))
    ids = np.frombuffer(text.encode(), np.uint8).astype("int32")
    starts = np.random.default_rng(0).integers(0, len(ids) - LENGTH, count * BATCH)
    windows = ids[starts[:, None] + np.arange(LENGTH + 1)]
    inputs = {
        "token_ids": windows[:, :-1],
        "padding_mask": np.ones([count * BATCH, LENGTH], "int32"),
    }
    return inputs, windows[:, 1:]


def make_model() -> keras.Model:
    """Returns a small Gemma for bytes, compiled."""
    backbone = keras_hub.models.GemmaBackbone(
        vocabulary_size=VOCABULARY,
        num_layers=2,
        num_query_heads=4,
        num_key_value_heads=4,
        hidden_dim=64,
        intermediate_dim=128,
        head_dim=16,
    )
    model = keras_hub.models.GemmaCausalLM(backbone, preprocessor=None)
    model.compile(
        keras.optimizers.Adam(1e-3),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    return model


def train(
    strategy: gshard_tf.SpmdStrategy | None, steps: int
) -> tuple[keras.Model, list[float]]:
    """Trains a model from the same seed.

    Args:
        strategy: The strategy. None: plain Keras.
        steps: Number of batches.

    Returns:
        The model, and the loss of each step.
    """
    keras.utils.set_random_seed(0)
    with strategy.scope() if strategy else contextlib.nullcontext():
        model = make_model()
    dataset = tf.data.Dataset.from_tensor_slices(read_batches(steps)).batch(BATCH)
    # An epoch is one step, so the history has the loss of each.
    history = model.fit(
        dataset, epochs=steps, steps_per_epoch=1, shuffle=False, verbose=0
    )
    return model, history.history["loss"]


def main(steps: int = STEPS, compared: int = 5) -> tuple[list[float], list[float]]:
    """Trains on the mesh, and some steps on one device.

    Args:
        steps: Steps on the mesh.
        compared: Steps on one device.

    Returns:
        The losses of the steps on the mesh, and on one device.
    """
    gshard_tf.request_cpu_devices(8)
    mesh = gshard_tf.create_mesh({"data": 2, "model": 4}, device_type="CPU")
    strategy = gshard_tf.SpmdStrategy(mesh, RULES)
    model, losses = train(strategy, steps)
    print("Layout of the table and of the first block:")
    for line in str(strategy.describe(model)).splitlines():
        if line.startswith(("weight", "token_embedding", "decoder_block_0")):
            print(line)
    _, expected = train(None, compared)
    print("\nstep  on the mesh  on one device")
    for step, (loss, other) in enumerate(zip(losses, expected, strict=False), 1):
        print(f"{step:4} {loss:12.6f} {other:14.6f}")
    print(f"{steps:4} {losses[-1]:12.6f}")
    return losses, expected


if __name__ == "__main__":
    main()
