"""Shapes that are partly known."""

from typing import Any

import tensorflow as tf


def sizes(x: tf.Tensor) -> list:
    """The dimensions of `x`, as ints where they are known."""
    dynamic = tf.shape(x)
    return [dynamic[i] if n is None else n for i, n in enumerate(x.shape)]


def positions(rank: int) -> list[str | None]:
    """Names of all dimensions but the last, which layers transform one by one.

    The first is the batch, the second of `[B, L, M]` the length. Others have none, as
    the height and width of `[B, H, W, M]`: no rule of a mesh is for them.
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
        layer: Whose inputs they are.
        input_shape: Of the inputs.
        least: How many dimensions there are at least.
        form: What inputs look like.
    """
    if len(input_shape) < least or input_shape[-1] is None:
        raise ValueError(
            f"Inputs of {type(layer).__name__} are {form}, of known width. "
            f"Received: input_shape={tuple(input_shape)}"
        )
