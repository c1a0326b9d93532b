"""Capacity: how many tokens of a group an expert has room for."""

import math
from typing import Any, cast

import tensorflow as tf

from keras_layers._arguments import check_positive

DROPLESS = "dropless"


def check_capacity_factor(name: str, value: Any) -> int | float | str:
    """Raises ValueError unless `value` is a number above 0, or "dropless"."""
    if isinstance(value, str) and value != DROPLESS:
        raise ValueError(
            f'{name} must be a number above 0, or "{DROPLESS}". '
            f"Received: {name}={value!r}"
        )
    return value if isinstance(value, str) else check_positive(name, value)


def capacity_in_force(
    mask: tf.Tensor,
    num_experts: int,
    capacity_factor: float | str,
    min_capacity: int = 1,
    multiple: int = 1,
) -> tf.Tensor:
    """Slots of each expert that may be filled in each group: `[G]` int32.

    `expert_capacity` of the group's real tokens, so that padding makes no room. The
    buffers keep their static size, that of a group without padding.

    Args:
        mask: `[G, S]` bool, False for padding.
        num_experts: E, of `expert_capacity`, as the others.
        capacity_factor: Slots per token, over all experts, or "dropless".
        min_capacity: Lower bound.
        multiple: The result is rounded up to a multiple of this.
    """
    arguments = (num_experts, capacity_factor, min_capacity, multiple)
    real = tf.reduce_sum(tf.cast(mask, tf.int32), axis=1)  # [G]
    size = mask.shape[1]
    if size is None:
        return expert_capacity(real, *arguments)
    # Looked up, so that it equals a batch without padding to the bit.
    table = [expert_capacity(n, *arguments) for n in range(size + 1)]
    return tf.gather(tf.constant(table, tf.int32), real)


def expert_capacity(
    group_size: int | tf.Tensor,
    num_experts: int,
    capacity_factor: float | str,
    min_capacity: int = 1,
    multiple: int = 1,
) -> int | tf.Tensor:
    """C, the slots that one expert has for one group: `ceil(S * factor / E)`.

    The paper's C = 2S/E is a factor of 2. Rounded up, so that a group smaller than
    the number of experts still has a slot in each; never more than S, since the
    choices of a token differ and no expert can receive more than each token once.

    Args:
        group_size: S, an int or a tensor of ints.
        num_experts: E, those that tokens may go to.
        capacity_factor: Slots per token, over all experts. "dropless": C = S, room for
            every choice.
        min_capacity: Lower bound on C (still at most S).
        multiple: C is rounded up to a multiple of this (still at most S).

    Returns:
        An int for an int, else an int32 tensor of the shape of `group_size`.
    """
    static = isinstance(group_size, int)
    if capacity_factor == DROPLESS:
        return group_size if static else tf.cast(group_size, tf.int32)
    capacity_factor = cast(float, capacity_factor)
    if static:
        # Rounding first, or 50 * 1.1 / 11 would need six slots.
        share = round(group_size * capacity_factor / num_experts, 6)
        slots = max(math.ceil(share), min_capacity)
        return min(group_size, -(-slots // multiple) * multiple)
    share = tf.cast(group_size, tf.float64) * (capacity_factor / num_experts)
    slots = tf.maximum(tf.cast(tf.math.ceil(share - 1e-6), tf.int32), min_capacity)
    return tf.minimum(tf.cast(group_size, tf.int32), -(-slots // multiple) * multiple)
