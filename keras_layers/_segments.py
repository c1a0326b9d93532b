"""Segments: several sequences in one row of the batch, none of which sees another.

Segment ids are ints, one for each position: 0 is padding, any other number names a
sequence of the row. Layers pass them on as `[B, L]`, and each attention compares them
where it selects scores. A mask `[B, 1, T, L]` made once for all layers would save
nothing: XLA merges equal comparisons (its TPU compiler stores one mask for a model, its
CPU compiler none), and remat would keep the mask in place of the ids.
"""

from typing import Any

import keras
import tensorflow as tf

from keras_layers._padding import unpadded_positions


def check_segment_ids(name: str, segment_ids: Any, positions: Any) -> None:
    """Raises ValueError unless `segment_ids` are ints for each of `positions`.

    Args:
        name: Name of the argument, for the message.
        segment_ids: Anything with a shape and a dtype, or None, which is valid.
        positions: Shape `[B, L]` of the tokens.
    """
    if segment_ids is None:
        return
    shape, positions = tuple(segment_ids.shape), tuple(positions)
    dtype = keras.backend.standardize_dtype(segment_ids.dtype)
    fits = len(shape) == 2 and all(
        ours == theirs or ours is None or theirs is None
        for ours, theirs in zip(shape, positions, strict=True)
    )
    if not fits or "int" not in dtype:
        raise ValueError(
            f"{name} must be integers of the shape [batch, length] of the tokens, "
            f"{positions}. Received: shape {shape}, dtype {dtype}"
        )


def check_both_or_none(first: tuple[str, Any], second: tuple[str, Any]) -> None:
    """Raises ValueError if one of two arguments, each with its name, is None."""
    names = (first[0], second[0])
    given = [name for name, x in (first, second) if x is not None]
    if len(given) == 1:
        raise ValueError(
            f"{names[0]} and {names[1]} must be given both or not at all. "
            f"Received: {given[0]} only"
        )


def real_tokens(mask: Any, segment_ids: Any) -> Any:
    """Returns `[B, L]` bool, False for padding by either; None if both are None."""
    if segment_ids is None:
        return mask
    real = keras.ops.not_equal(segment_ids, 0)
    if mask is None:
        return real
    return keras.ops.logical_and(keras.ops.cast(mask, "bool"), real)


def same_segment(queries: tf.Tensor, keys: tf.Tensor) -> tf.Tensor:
    """Mask of the keys a query sees: `[B, T]`, `[B, L]` ids -> `[B, 1, T, L]` bool.

    Padding, in segment 0, sees padding only.
    """
    queries = tf.cast(queries, tf.int32)[:, None, :, None]
    keys = tf.cast(keys, tf.int32)[:, None, None, :]
    return tf.equal(queries, keys)


def token_positions(mask: tf.Tensor, segment_ids: tf.Tensor | None) -> tf.Tensor:
    """Number of real tokens before each position, of its own segment: `[B, L]` int32.

    For a real token, its position in its sequence alone and without padding. Parts of a
    segment may stand apart.

    Args:
        mask: `[B, L]` bool, False for padding.
        segment_ids: `[B, L]`, or None for one segment.
    """
    if segment_ids is None:
        return unpadded_positions(mask)
    before = tf.logical_and(_earlier_of_segment(segment_ids), mask[:, None, :])
    return tf.reduce_sum(tf.cast(before, tf.int32), axis=-1)


def segment_starts(ids: Any, segment_ids: Any) -> Any:
    """Returns whether a position is the first of its segment, bool.

    Args:
        ids: `[B, L]`, tokens.
        segment_ids: `[B, L]`, or None for one segment, which gives `[L]`.
    """
    if segment_ids is None:
        return keras.ops.equal(keras.ops.arange(keras.ops.shape(ids)[1]), 0)
    earlier = _earlier_of_segment(segment_ids)
    return keras.ops.logical_not(keras.ops.any(earlier, axis=-1))


def _earlier_of_segment(segment_ids: Any) -> Any:
    """Mask `[B, L, L]`, True where [b, t] has [b, l] before it in its segment.

    All pairs, as in attention, but once for a model and without its heads: so segments
    may stand in any order, and apart.
    """
    position = keras.ops.arange(keras.ops.shape(segment_ids)[1])
    earlier = keras.ops.less(position[None, :], position[:, None])  # [L, L]
    same = keras.ops.equal(
        keras.ops.expand_dims(segment_ids, 2), keras.ops.expand_dims(segment_ids, 1)
    )
    return keras.ops.logical_and(same, earlier)
