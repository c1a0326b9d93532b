"""Padding: the positions of a batch that a mask hides."""

import tensorflow as tf


def zero_padding(x: tf.Tensor, mask: tf.Tensor | None) -> tf.Tensor:
    """`x` `[..., M]`, and 0 where `mask` `[...]` is False; so is the gradient there.

    A selection, not a product: what stands in padding may be NaN or infinite, and 0
    times that is NaN, in the values and in the gradients of all weights.
    """
    if mask is None:
        return x
    return tf.where(tf.cast(mask, tf.bool)[..., None], x, tf.zeros([], x.dtype))


def places(mask: tf.Tensor) -> tf.Tensor:
    """How many real tokens come before each position: `[B, L]` bool -> int32.

    For a real token, its position in the sequence without padding.
    """
    return tf.cumsum(tf.cast(mask, tf.int32), axis=-1, exclusive=True)
