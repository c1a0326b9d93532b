"""Windows over images that are split by height and width, with explicit halos.

XLA's partitioner gets some of them wrong (`docs/correctness.md`), so that it is given
whole images there. In a manual region each device gets the rows and columns that it
needs from its neighbors, and nothing else is sent; the gradient sends them back.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from gshard_tf.parallel.halo_exchange import Reached, Window, exchange, own_outputs
from gshard_tf.sharding.annotations import annotate, partitioning
from gshard_tf.sharding.manual import manual, mesh_axis

_IMAGE = ("batch", "height", "width", None)
_KERNEL = (None, None, None, None)
_DIMENSIONS = (1, 2)


def halo_convolution(
    images: tf.Tensor,
    kernel: tf.Tensor,
    strides: Sequence[int] = (1, 1),
    dilation_rate: Sequence[int] = (1, 1),
    padding: str = "same",
    groups: int = 1,
) -> tf.Tensor:
    """Returns a convolution of images that are split by height and width.

    `tf.nn.conv2d`, in which a device sends its neighbors the rows and columns that
    their windows see, and no more. Sizes need not divide by the devices: each but the
    last ones then has `ceil(size / devices)` rows, of inputs and of outputs.

    Args:
        images: `[batch, height, width, channels]`.
        kernel: `[rows, columns, channels / groups, filters]`.
        strides: Of height and width.
        dilation_rate: Of the kernel's rows and columns.
        padding: `"same"` or `"valid"`.
        groups: The number of groups of channels, each with filters of its own.

    Returns:
        `[batch, height', width', filters]`, with the sizes of `tf.nn.conv2d`.

    Raises:
        ValueError: when `padding` is another one, or height or width is unknown or
            smaller than a kernel without padding.
    """
    windows = [
        _window(*each, padding)
        for each in zip(
            images.shape[1:3], kernel.shape[:2], strides, dilation_rate, strict=True
        )
    ]
    fn = functools.partial(_convolve, windows, groups, "HWIO")
    return _by_parts(fn, windows, images, kernel)


def halo_transposed_convolution(
    images: tf.Tensor,
    kernel: tf.Tensor,
    output_size: Sequence[int],
    strides: Sequence[int] = (1, 1),
    dilation_rate: Sequence[int] = (1, 1),
    padding: str = "same",
) -> tf.Tensor:
    """Returns a transposed convolution of images that are split by height and width.

    `tf.nn.conv2d_transpose`, as `halo_convolution` is `tf.nn.conv2d`: the gradient of
    the convolution that makes images of this size from those of `output_size`.

    Args:
        images: `[batch, height, width, channels]`.
        kernel: `[rows, columns, filters, channels]`.
        output_size: Height and width of the outputs. The convolution of them has the
            height and width of `images`.
        strides: Of height and width of the outputs.
        dilation_rate: Of the kernel's rows and columns.
        padding: `"same"` or `"valid"`.

    Returns:
        `[batch, *output_size, filters]`.

    Raises:
        ValueError: as `halo_convolution`, and when `output_size` does not fit.
    """
    windows = []
    for inputs, size, outputs, stride, dilation in zip(
        images.shape[1:3],
        kernel.shape[:2],
        output_size,
        strides,
        dilation_rate,
        strict=True,
    ):
        forward = _window(outputs, size, stride, dilation, padding)
        if forward.outputs != inputs:
            raise ValueError(
                "`output_size` must be one of which the convolution has the size of "
                f"the images. Received: output_size={tuple(output_size)}, "
                f"images of shape {images.shape}"
            )
        before = (size - 1) * dilation - forward.before
        windows.append(Window(size, 1, dilation, before, inputs, outputs, stride))
    fn = functools.partial(_convolve, windows, 1, "HWOI")
    return _by_parts(fn, windows, images, tf.reverse(kernel, (0, 1)))


def halo_max_pool(
    images: tf.Tensor,
    pool_size: Sequence[int],
    strides: Sequence[int],
    padding: str = "same",
) -> tf.Tensor:
    """Returns the maxima over windows of images that are split by height and width.

    Args:
        images: `[batch, height, width, channels]`.
        pool_size: Of height and width.
        strides: Of height and width.
        padding: `"same"` or `"valid"`.

    Returns:
        `[batch, height', width', channels]`, with the sizes of `tf.nn.max_pool2d`.

    Raises:
        ValueError: as `halo_convolution`.
    """
    windows = _pooling(images, pool_size, strides, padding)
    fn = functools.partial(_max_pool, windows)
    return _by_parts(fn, windows, images, edge=-np.inf)


def halo_average_pool(
    images: tf.Tensor,
    pool_size: Sequence[int],
    strides: Sequence[int],
    padding: str = "same",
) -> tf.Tensor:
    """Returns the means over windows of images that are split by height and width.

    Of what a window sees of the image, without padding.

    Args:
        images: `[batch, height, width, channels]`.
        pool_size: Of height and width.
        strides: Of height and width.
        padding: `"same"` or `"valid"`.

    Returns:
        `[batch, height', width', channels]`, with the sizes of `tf.nn.avg_pool2d`.

    Raises:
        ValueError: as `halo_convolution`.
    """
    windows = _pooling(images, pool_size, strides, padding)
    sums = _by_parts(functools.partial(_sum_pool, windows), windows, images)
    rows, columns = (tf.constant(_seen(each), sums.dtype) for each in windows)
    return sums / (rows[:, None, None] * columns[:, None])


def _pooling(
    images: tf.Tensor, pool_size: Sequence[int], strides: Sequence[int], padding: str
) -> list[Window]:
    sizes = zip(images.shape[1:3], pool_size, strides, (1, 1), strict=True)
    return [_window(*each, padding) for each in sizes]


def _window(
    inputs: int | None, size: int, stride: int, dilation: int, padding: str
) -> Window:
    """A window as TensorFlow pads it."""
    if inputs is None:
        raise ValueError("Height and width must be known. Received: None")
    reach = (size - 1) * dilation + 1
    if padding == "same":
        outputs = -(-inputs // stride)
        before = max((outputs - 1) * stride + reach - inputs, 0) // 2
    elif padding == "valid":
        outputs, before = (inputs - reach) // stride + 1, 0
    else:
        raise ValueError(
            f"`padding` must be 'same' or 'valid'. Received: padding={padding!r}"
        )
    if outputs < 1:
        raise ValueError(
            "An image must be as large as the window. "
            f"Received: size={inputs}, window of {reach}"
        )
    return Window(size, stride, dilation, before, inputs, outputs)


def _seen(window: Window) -> list[int]:
    """The elements of the image that each window sees."""
    firsts = range(-window.before, window.outputs * window.stride, window.stride)
    return [
        min(first + window.size, window.inputs) - max(first, 0)
        for first in firsts[: window.outputs]
    ]


def _by_parts(
    fn: Callable,
    windows: Sequence[Window],
    images: tf.Tensor,
    *kernels: tf.Tensor,
    edge: float = 0.0,
) -> tf.Tensor:
    """The outputs that devices compute of their parts, padded to parts of one size."""
    active = partitioning(images)
    padded = images
    if active is not None:
        parts = [active.parts(name) for name in _IMAGE[:3]]
        sizes = zip(images.shape[:3], parts, strict=True)
        pads = [0 if size is None else -size % n for size, n in sizes]
        padded = annotate(images, _IMAGE)
        if any(pads):
            paddings = [(0, pad) for pad in (*pads, 0)]
            padded = annotate(tf.pad(padded, paddings, constant_values=edge), _IMAGE)
    in_axes = [_IMAGE, *(_KERNEL for _ in kernels)]
    outputs = manual(fn, in_axes, _IMAGE)(padded, *kernels)
    height, width = (window.outputs for window in windows)
    if outputs.shape[:3] != (images.shape[0], height, width):
        # (The partitioner gathers for the gradient of tf.slice.)
        outputs = annotate(outputs, _IMAGE)[: images.shape[0], :height, :width]
    return annotate(outputs, _IMAGE)


def _with_halos(
    images: Any, windows: Sequence[Window], edge: float = 0.0
) -> tuple[Any, list[Reached]]:
    axes = [mesh_axis("height"), mesh_axis("width")]
    return exchange(images, _DIMENSIONS, axes, windows, edge)


def _convolve(
    windows: Sequence[Window], groups: int, order: str, images: Any, kernel: Any
) -> Any:
    from jax import lax

    images, reached = _with_halos(images, windows)
    outputs = lax.conv_general_dilated(
        images,
        kernel,
        [window.stride for window in windows],
        [each.padding for each in reached],
        lhs_dilation=[window.spread for window in windows],
        rhs_dilation=[window.dilation for window in windows],
        dimension_numbers=("NHWC", order, "NHWC"),
        feature_group_count=groups,
    )
    return own_outputs(outputs, _DIMENSIONS, reached)


def _max_pool(windows: Sequence[Window], images: Any) -> Any:
    import jax.numpy as jnp
    from jax import lax

    images, reached = _with_halos(images, windows, -jnp.inf)
    return _reduce(images, -jnp.inf, lax.max, windows, reached)


def _sum_pool(windows: Sequence[Window], images: Any) -> Any:
    import jax.numpy as jnp
    from jax import lax

    images, reached = _with_halos(images, windows)
    wide = images.astype(jnp.promote_types(images.dtype, jnp.float32))
    sums = _reduce(wide, 0.0, lax.add, windows, reached)
    return sums.astype(images.dtype)


def _reduce(
    images: Any,
    initial: float,
    operation: Callable,
    windows: Sequence[Window],
    reached: Sequence[Reached],
) -> Any:
    from jax import lax

    return lax.reduce_window(
        images,
        initial,
        operation,
        (1, *(window.size for window in windows), 1),
        (1, *(window.stride for window in windows), 1),
        ((0, 0), *(each.padding for each in reached), (0, 0)),
    )
