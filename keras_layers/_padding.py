"""Padding: the positions of a batch that a mask hides."""

import tensorflow as tf


def zero_padding(x: tf.Tensor, mask: tf.Tensor | None) -> tf.Tensor:
    """Returns `x` `[..., M]` with 0, and no gradient, where `mask` `[...]` is False.

    A selection, not a product: padding may be NaN or infinite, and 0 times that is NaN,
    in the values and in the gradients of all weights.
    """
    if mask is None:
        return x
    return tf.where(tf.cast(mask, tf.bool)[..., None], x, tf.zeros([], x.dtype))


def unpadded_positions(mask: tf.Tensor) -> tf.Tensor:
    """Number of real tokens before each position: `[B, L]` bool -> int32.

    For a real token, its position in the sequence without padding.
    """
    return tf.cumsum(tf.cast(mask, tf.int32), axis=-1, exclusive=True)


def masked_mean(values: tf.Tensor, mask: tf.Tensor | None) -> tf.Tensor:
    """Mean of `[G, S]` over real tokens; 0 if there are none."""
    if mask is None:
        return tf.reduce_mean(values)
    mask = tf.cast(mask, tf.bool)
    total = tf.reduce_sum(tf.where(mask, values, 0.0))
    return total / tf.maximum(tf.reduce_sum(tf.cast(mask, tf.float32)), 1.0)
