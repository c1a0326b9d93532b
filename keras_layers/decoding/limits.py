"""Limits of the length of what is generated."""

import tensorflow as tf

from keras_layers._arguments import check_int, check_positive
from keras_layers._shapes import static_shape


def length_limits(
    source_ids: tf.Tensor, pad_id: int = 0, factor: float = 1.5, extra: int = 10
) -> tf.Tensor:
    """Returns the limit of each output: `ceil(factor * source length) + extra`.

    Args:
        source_ids: `[B, L]`, padded with `pad_id`.
        pad_id: Id of padding.
        factor: Target tokens per source token. Well above the usual ratio of the two
            languages: it stops sequences that would not end.
        extra: For short sources, whose ratio varies most.

    Returns:
        int32 `[B]`: the `limits` of `greedy_decode`, `sample_decode`, `beam_search`.

    Raises:
        ValueError: for a factor of 0 or less, or a negative number.
    """
    pad_id = check_int("pad_id", pad_id, 0)
    factor = check_positive("factor", factor)
    extra = check_int("extra", extra, 0)
    real = tf.cast(tf.not_equal(source_ids, pad_id), tf.float32)
    lengths = tf.math.ceil(factor * tf.reduce_sum(real, axis=-1))
    return tf.cast(lengths, tf.int32) + extra


def row_limits(
    source_ids: tf.Tensor, max_length: int, limits: tf.Tensor | None
) -> tf.Tensor:
    """Returns the limit of each row, int32 `[B]`, in `[1, max_length]`."""
    if limits is None:
        return tf.fill([static_shape(source_ids)[0]], max_length)
    return tf.clip_by_value(tf.cast(limits, tf.int32), 1, max_length)
