"""Shapes that are partly known, and the axes of positions."""

from typing import Any

import tensorflow as tf


def static_shape(x: tf.Tensor) -> list[Any]:
    """Returns the dimensions of `x`, as ints where they are known."""
    dynamic = tf.shape(x)
    return [dynamic[i] if n is None else n for i, n in enumerate(x.shape)]


def position_axes(rank: int) -> list[str | None]:
    """Logical axes of all dimensions but the last, for layers that act on the last.

    The first is the batch, the second of `[B, L, M]` the length. Others have none, such
    as height and width of `[B, H, W, M]`: no rule of a mesh is for them.
    """
    return ["batch", *(["length"] if rank == 3 else [None] * (rank - 2))]


def at_each_position(inputs: tf.Tensor, weight: tf.Tensor) -> tf.Tensor:
    """`[..., M]` times `[M, H]` -> `[..., H]`."""
    # As many letters as dimensions: XLA has no ellipsis.
    letters = "BLIJKNOPQRSTUVWXYZ"[: len(inputs.shape) - 1]
    return tf.einsum(f"{letters}M,MH->{letters}H", inputs, weight)


def check_positions(layer: Any, input_shape: Any, least: int, form: str) -> None:
    """Raises ValueError unless inputs have `least` dimensions and a known width.

    Args:
        layer: The layer, for the message.
        input_shape: Shape of its inputs.
        least: The fewest dimensions.
        form: Form of valid inputs, for the message.
    """
    if len(input_shape) < least or input_shape[-1] is None:
        raise ValueError(
            f"Inputs of {type(layer).__name__} must be {form}, of known width. "
            f"Received: input_shape={tuple(input_shape)}"
        )
