"""Cases of convolutions whose images are split by height (and width)."""

from collections.abc import Callable, Mapping
from typing import Any

import keras

from benchmarks.partitioner.cases import EIGHT, Annotate, Case
from keras_layers import (
    AveragePooling2D,
    Conv2D,
    Conv2DTranspose,
    DepthwiseConv2D,
    MaxPooling2D,
    SeparableConv2D,
)

B, S, C = 2, 128, 16  # images [B, S, S, C]
ROW = B * S * C * 4  # bytes of a row of all images
KERNEL = 9 * C * C * 4
SCALE = C * 4
HEIGHT = {"height": "x"}


def image(*layers: Callable) -> Callable[[], list[Callable]]:
    """Layers behind one that needs their gradient, whose own inputs are data."""

    def make():
        first = keras.layers.EinsumDense("bhwc,c->bhwc", (None, None, C), name="scale")
        spec = ("batch", "height", "width", None)
        made = [layer() for layer in layers]
        return [Annotate(*spec), first, *made, Annotate(*spec)]

    return make


def conv(kind: Callable = Conv2D, **kwargs: Any) -> Callable:
    return lambda: kind(C, 3, **{"padding": "same", "use_bias": False, **kwargs})


def depthwise(**kwargs: Any) -> Callable:
    return lambda: DepthwiseConv2D(3, padding="same", use_bias=False, **kwargs)


def _case(
    name: str,
    layer: Callable,
    rows: int,
    kernel: int = KERNEL,
    size: int = S,
    mesh: Mapping[str, int] = EIGHT,
    rules: Mapping[str, str] = HEIGHT,
    expected: Mapping[str, int] | None = None,
) -> Case:
    """A layer of images that are split by height.

    Args:
        name: For the table.
        layer: Makes the layer.
        rows: The rows of inputs and of their gradients that a device receives.
        kernel: Bytes of the layer's weights.
        size: The height of the outputs.
        mesh: Axes and sizes.
        rules: Those of the axes.
        expected: In place of rows and weights.
    """
    sums = {"collective-permute": rows * ROW, "all-reduce": kernel + SCALE}
    sums = {kind: n for kind, n in (expected or sums).items() if n}
    return Case(
        f"images split by height, {name}",
        image(layer),
        mesh,
        {"rules": rules},
        sums,
        # The halo, forward or backward.
        kept=sums.get("collective-permute", 0) // 2,
        x=(B, S, S, C),
        y=(B, size, size, C),
    )


IMAGES = [
    # A row from each neighbor, of inputs and of their gradients.
    _case("3x3", conv(), 4),
    # The row below alone.
    _case("3x3 with stride 2", conv(strides=2), 2, size=S // 2),
    _case("3x3 with dilation 2", conv(dilation_rate=2), 8),
    # Two rows of the device below. 126 rows: the last device has 14.
    _case("3x3 without padding", conv(padding="valid"), 4, size=S - 2),
    # Every second row of the outputs sees two of the inputs: its own, and that above.
    _case(
        "3x3 transposed, stride 2",
        conv(Conv2DTranspose, strides=2),
        2,
        size=2 * S,
    ),
    _case("3x3 depthwise", depthwise(), 4, kernel=9 * C * 4),
    _case(
        "3x3 separable",
        conv(SeparableConv2D),
        4,
        kernel=9 * C * 4 + C * C * 4,
    ),
    _case("2x2 pooling", lambda: keras.layers.MaxPooling2D(2), 0, 0, S // 2),
    _case(
        "3x3 pooling with stride 2",
        lambda: MaxPooling2D(3, 2, padding="same"),
        2,
        0,
        S // 2,
    ),
    _case(
        "3x3 mean pooling with stride 1",
        lambda: AveragePooling2D(3, 1, padding="same"),
        4,
        0,
    ),
    # Means of values and of squares, and the two sums of the gradient.
    _case("batch normalization", keras.layers.BatchNormalization, 0, 4 * C * 4),
    _case(
        "and by width, 3x3",
        conv(),
        0,
        mesh={"x": 4, "y": 2},
        rules={"height": "x", "width": "y"},
        # Rows of half the width; columns of a quarter of the height, with the corners.
        expected={
            "collective-permute": 4 * ROW // 2 + 4 * (S // 4 + 2) * B * C * 4,
            "all-reduce": KERNEL + SCALE,
        },
    ),
    # Keras's own, which XLA's partitioner splits or is kept from (docs/correctness.md).
    _case("Keras's 3x3", conv(keras.layers.Conv2D), 4),
    _case(
        "Keras's 3x3 with stride 2",
        conv(keras.layers.Conv2D, strides=2),
        2,
        size=S // 2,
    ),
    _case(
        "Keras's 3x3 transposed, stride 2",
        conv(keras.layers.Conv2DTranspose, strides=2),
        2,
        size=2 * S,
    ),
]
