"""A BERT of the TF Model Garden on a mesh, with the Model Garden's own optimizer.

    pip install -e '.[model-garden]'
    python -m gshard_examples.model_garden

The network, the AdamW that leaves norms and biases alone, and the learning rate that
warms up and falls are those of `official`, unchanged. Path rules split the weights.
tf-models-official 2.20 needs TensorFlow 2.20 and Keras 2 (`tf_keras`). The devices are
8 virtual ones of the CPU; on GPUs, leave `request_cpu_devices` and `device_type="CPU"`
out.
"""

from __future__ import annotations

import contextlib
import os
import re

# XLA and TensorFlow log pages otherwise, before and while they compile.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
import tensorflow as tf
import tf_keras
from official.nlp import modeling, optimization

import gshard_tf

VOCABULARY, LENGTH, CLASSES, BATCH, STEPS = 256, 16, 4, 32, 200

RULES = gshard_tf.AxisRules(
    {"batch": "data", "vocab": "model", "heads": "model", "mlp": "model"},
    paths=[
        (r".*word_embeddings/embeddings", ("vocab", None)),
        (r".*/self_attention/(query|key|value)/kernel", (None, "heads", None)),
        (r".*/self_attention/attention_output/kernel", ("heads", None, None)),
        (r".*/intermediate/kernel", (None, "mlp")),
        (r".*/output/kernel", ("mlp", None)),
    ],
)


def make_sentences(count: int) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Makes sentences, labeled with the quarter of the vocabulary of their first word.

    Returns:
        The inputs of BERT, [count, LENGTH] each, and labels [count].
    """
    random = np.random.default_rng(1)
    words = random.integers(4, VOCABULARY, [count, LENGTH]).astype("int32")
    inputs = {
        "input_word_ids": words,
        "input_mask": np.ones_like(words),
        "input_type_ids": np.zeros_like(words),
    }
    return inputs, words[:, 0] * CLASSES // VOCABULARY


def make_model(steps: int) -> tf_keras.Model:
    """Returns a small BERT classifier, compiled for a schedule of so many steps."""
    encoder = modeling.networks.BertEncoderV2(
        vocab_size=VOCABULARY,
        hidden_size=64,
        num_layers=2,
        num_attention_heads=4,
        inner_dim=128,
        max_sequence_length=LENGTH,
        output_dropout=0.0,
        attention_dropout=0.0,
    )
    model = modeling.models.BertClassifier(encoder, CLASSES, dropout_rate=0.0)
    # AdamW, whose rate rises for a tenth of the steps and falls to 0 in the end.
    optimizer = optimization.create_optimizer(1e-3, steps, steps // 10)
    model.compile(
        optimizer,
        tf_keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    return model


def train(
    strategy: gshard_tf.SpmdStrategy | None, steps: int, schedule_steps: int
) -> tuple[tf_keras.Model, list[float]]:
    """Trains a model from the same seed.

    Args:
        strategy: The strategy. None: plain Keras 2.
        steps: Number of batches.
        schedule_steps: Length of the schedule.

    Returns:
        The model, and the loss of each step.
    """
    tf_keras.utils.set_random_seed(0)
    with strategy.scope() if strategy else contextlib.nullcontext():
        model = make_model(schedule_steps)
    dataset = tf.data.Dataset.from_tensor_slices(make_sentences(steps * BATCH))
    # An epoch is one step, so the history has the loss of each.
    history = model.fit(
        dataset.batch(BATCH).repeat(), epochs=steps, steps_per_epoch=1, verbose=0
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
    model, losses = train(strategy, steps, steps)
    print("Layout of the table and of the first block's kernels, with their slots:")
    for line in str(strategy.describe(model)).splitlines():
        if re.match(r"weight|\S*(/word_embeddings/|/layer_0/.*/kernel)", line):
            print(line)
    _, expected = train(None, compared, steps)
    print("\nstep  on the mesh  on one device")
    for step, (loss, other) in enumerate(zip(losses, expected, strict=False), 1):
        print(f"{step:4} {loss:12.6f} {other:14.6f}")
    print(f"{steps:4} {losses[-1]:12.6f}")
    return losses, expected


if __name__ == "__main__":
    main()
