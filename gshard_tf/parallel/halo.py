"""Windows over images that are split by height and width, with explicit halos.

XLA's partitioner gets some of them wrong (`docs/correctness.md`), so that it is given
whole images there. In a manual region each device gets the rows and columns that it
needs from its neighbors, and nothing else is sent; the gradient sends them back.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import tensorflow as tf

from gshard_tf.sharding.manual import manual, mesh_axis

_IMAGE = ("batch", "height", "width", None)
_KERNEL = (None, None, None, None)


class _Window(NamedTuple):
    """A window over one dimension of an image."""

    size: int
    stride: int
    dilation: int

    def halo(self) -> tuple[int, int]:
        """The elements before and after a part that its windows reach to.

        As TensorFlow pads for "same", where the stride divides the dimension.
        """
        total = max((self.size - 1) * self.dilation + 1 - self.stride, 0)
        return total // 2, total - total // 2


def halo_convolution(
    images: tf.Tensor,
    kernel: tf.Tensor,
    strides: Sequence[int] = (1, 1),
    dilation_rate: Sequence[int] = (1, 1),
) -> tf.Tensor:
    """Returns a convolution with "same" padding of images split by height and width.

    Args:
        images: `[batch, height, width, channels]`.
        kernel: `[rows, columns, channels, filters]`.
        strides: Of height and width. They divide a device's part.
        dilation_rate: Of the kernel's rows and columns.

    Returns:
        `[batch, height / stride, width / stride, filters]`.

    Raises:
        ValueError: when a part does not divide by the stride, or is smaller than the
            halo that its neighbor needs.
    """
    windows = [
        _Window(*each)
        for each in zip(kernel.shape[:2], strides, dilation_rate, strict=True)
    ]
    region = manual(functools.partial(_convolve, windows), [_IMAGE, _KERNEL], _IMAGE)
    return region(images, kernel)


def halo_max_pool(
    images: tf.Tensor, pool_size: Sequence[int], strides: Sequence[int]
) -> tf.Tensor:
    """Returns the maxima over windows, with "same" padding, of split images.

    Args:
        images: `[batch, height, width, channels]`.
        pool_size: Of height and width.
        strides: Of height and width. They divide a device's part.

    Returns:
        `[batch, height / stride, width / stride, channels]`.

    Raises:
        ValueError: as `halo_convolution`.
    """
    sizes = zip(pool_size, strides, (1, 1), strict=True)
    windows = [_Window(*each) for each in sizes]
    return manual(functools.partial(_max_pool, windows), [_IMAGE], _IMAGE)(images)


def _convolve(windows: Sequence[_Window], images: Any, kernel: Any) -> Any:
    from jax import lax

    return lax.conv_general_dilated(
        _with_halos(images, windows, 0),
        kernel,
        [window.stride for window in windows],
        "VALID",
        rhs_dilation=[window.dilation for window in windows],
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


def _max_pool(windows: Sequence[_Window], images: Any) -> Any:
    import jax.numpy as jnp
    from jax import lax

    lowest = -jnp.inf
    return lax.reduce_window(
        _with_halos(images, windows, lowest),
        lowest,
        lax.max,
        (1, *(window.size for window in windows), 1),
        (1, *(window.stride for window in windows), 1),
        "VALID",
    )


def _with_halos(images: Any, windows: Sequence[_Window], edge: float) -> Any:
    for dimension, axis, window in zip(
        (1, 2), ("height", "width"), windows, strict=True
    ):
        images = _with_halo(images, dimension, mesh_axis(axis), window, edge)
    return images


def _with_halo(x: Any, dimension: int, axis: str, window: _Window, edge: float) -> Any:
    """A part with what its windows need of its neighbors, or `edge` at the ends."""
    import jax.numpy as jnp
    from jax import lax

    n, here = lax.axis_size(axis), lax.axis_index(axis)
    size = x.shape[dimension]
    before, after = window.halo()
    if size % window.stride or size < max(before, after):
        raise ValueError(
            "A device's part of an image must divide by the stride and be as large as "
            f"the halo. Received: {size} of {n} parts, stride={window.stride}, "
            f"halo={max(before, after)}"
        )

    def neighbors(part: Any, to_next: bool) -> Any:
        if n == 1:
            return jnp.full_like(part, edge)
        step = 1 if to_next else -1
        pairs = [(i, i + step) for i in range(n) if 0 <= i + step < n]
        moved = lax.ppermute(part, axis, pairs)
        if edge == 0:  # what nobody sends
            return moved
        return jnp.where(here == (0 if to_next else n - 1), edge, moved)

    cut: Callable = functools.partial(lax.slice_in_dim, x, axis=dimension)
    parts = [x]
    if before:
        parts.insert(0, neighbors(cut(size - before, size), to_next=True))
    if after:
        parts.append(neighbors(cut(0, after), to_next=False))
    return jnp.concatenate(parts, dimension)
