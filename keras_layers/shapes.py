"""Shapes that are partly known."""

import tensorflow as tf


def sizes(x: tf.Tensor) -> list:
    """The dimensions of `x`, as ints where they are known."""
    dynamic = tf.shape(x)
    return [dynamic[i] if n is None else n for i, n in enumerate(x.shape)]
