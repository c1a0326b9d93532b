"""A ResNet on images that are too large for one device: split by height and width.

    python -m gshard_examples.spatial_resnet
    pip install -e '.[aot]' && python -m gshard_examples.spatial_resnet v5e:2x4

Each of 8 devices has a tile of every image, in a grid of 4 x 2. Convolutions and
pooling of `keras_layers` send the rows and columns at the edges of tiles, and
BatchNormalization sums over all. The losses are those of plain Keras on one device.
With a TPU slice as argument, its compiler says what a device needs for large images, of
one chip and of the slice. The devices are virtual ones of the CPU; on GPUs, leave
`request_cpu_devices` and `device_type="CPU"` out.
"""

from __future__ import annotations

import contextlib
import os
import sys
from typing import Any

# XLA and TensorFlow log pages otherwise, before and while they compile.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import tensorflow as tf

import gshard_tf
from keras_layers import Conv2D, MaxPooling2D

SIZE, BATCH, STEPS, COMPARED = 64, 4, 20, 5
FILTERS, BLOCKS = (16, 32), 1
# Images of 67 million pixels, as of a satellite or a microscope.
LARGE, LARGE_FILTERS = 8192, (64, 128)

MESH = {"rows": 4, "columns": 2}
RULES = gshard_tf.AxisRules({"height": "rows", "width": "columns"})


class Tiles(keras.layers.Layer):
    """The identity: images [B, H, W, C] are split from here on."""

    def call(self, images: Any) -> Any:
        return gshard_tf.annotate(images, ("batch", "height", "width", None))


def convolution(x: Any, filters: int, size: int, strides: int = 1) -> Any:
    """A convolution and BatchNormalization."""
    x = Conv2D(filters, size, strides, padding="same", use_bias=False)(x)
    return keras.layers.BatchNormalization()(x)


def block(x: Any, filters: int, strides: int) -> Any:
    """Two convolutions, and a shortcut around them."""
    shortcut = x
    if strides > 1 or x.shape[-1] != filters:
        shortcut = convolution(x, filters, 1, strides)
    x = keras.layers.ReLU()(convolution(x, filters, 3, strides))
    return keras.layers.ReLU()(convolution(x, filters, 3) + shortcut)


def make_model(size: int, filters: tuple[int, ...], blocks: int) -> keras.Model:
    """Returns a ResNet that says which of two kinds an image is, compiled."""
    images = keras.Input([size, size, 3])
    x = keras.layers.ReLU()(convolution(Tiles()(images), filters[0], 7, 2))
    x = MaxPooling2D(3, 2, padding="same")(x)
    for stage, width in enumerate(filters):
        for i in range(blocks):
            x = block(x, width, 2 if stage and not i else 1)
    x = keras.layers.GlobalAveragePooling2D()(x)
    model = keras.Model(images, keras.layers.Dense(2, name="kinds")(x))
    model.compile(
        keras.optimizers.SGD(0.01, momentum=0.9),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    return model


def make_batch(step: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns waves in noise, along the height or along the width, and which."""
    rng = np.random.default_rng(step)
    kinds = rng.integers(0, 2, BATCH)
    wave = np.sin(np.arange(SIZE) / 2 + rng.uniform(0, 6, [BATCH, 1]))
    wave = np.where(kinds[:, None, None], wave[:, None], wave[:, :, None])
    noise = rng.normal(size=[BATCH, SIZE, SIZE, 3])
    return (wave[..., None] + noise).astype("float32"), kinds.astype("int32")


def train(
    strategy: gshard_tf.SpmdStrategy | None, steps: int
) -> tuple[keras.Model, list[float]]:
    """Returns a model and the losses of its first steps.

    Args:
        strategy: Over tiles; None: plain Keras on one device.
        steps: The number of steps.
    """
    keras.utils.set_random_seed(0)
    with contextlib.nullcontext() if strategy is None else strategy.scope():
        model = make_model(SIZE, FILTERS, BLOCKS)
    losses = [float(model.train_on_batch(*make_batch(step))) for step in range(steps)]
    return model, losses


def plan_large(topology: str) -> None:
    """Prints what a device needs for large images: of one chip, and of a slice of 8."""
    batch = tf.TensorSpec([1, LARGE, LARGE, 3]), tf.TensorSpec([1], tf.int32)
    chip = topology.partition(":")[0] + ":1x1"
    one = dict.fromkeys(MESH, 1)
    for slice_, mesh in ((chip, one), (topology, MESH)):
        plan = gshard_tf.plan(
            lambda: make_model(LARGE, LARGE_FILTERS, BLOCKS), slice_, mesh, RULES, batch
        )
        fits = "fits" if plan.fits else "does not fit"
        print(
            f"{slice_}: {LARGE} x {LARGE} pixels {fits}: {plan.bytes_needed / 1e9:.1f} "
            f"of {(plan.bytes_available or 0) / 1e9:.1f} GB a device"
        )


def main(
    topology: str | None = None, steps: int = STEPS, compared: int = COMPARED
) -> tuple[list[float], list[float]]:
    """Trains on tiles; returns the losses, and the first ones of plain Keras."""
    if topology is not None:
        plan_large(topology)
    gshard_tf.request_cpu_devices(8)
    strategy = gshard_tf.SpmdStrategy(gshard_tf.create_mesh(MESH, "CPU"), RULES)
    model, losses = train(strategy, steps)
    _, plain = train(None, compared)
    print("first losses:", *(f"{loss:.5f}" for loss in losses[:compared]))
    print("one device:  ", *(f"{loss:.5f}" for loss in plain))
    print(f"last loss: {losses[-1]:.5f}")
    print(strategy.describe(model))
    return losses, plain


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else None)
