"""Initializers of weights that have more dimensions than a matrix.

Keras scales by the fan of a matrix or a convolution kernel. It would treat the experts
of `[E, M, H]` as a convolution's window and make the variance E times too small, and
the heads of `[M, N, D]` likewise.
"""

from collections.abc import Callable, Sequence
from typing import Any

import keras
import tensorflow as tf

from keras_layers._seeds import child_initializer


def per_expert_fan(initializer: keras.initializers.Initializer, name: str) -> Callable:
    """Returns `initializer` with its fan counted within one expert of `[E, ...]`.

    The dimension of experts multiplies every fan (in, out and their mean) of a
    `VarianceScaling` by E, so the values are scaled back by the square root of E.
    Initializers that do not scale by a fan are only copied.

    Args:
        initializer: The initializer of all weights of a layer.
        name: Name of the weight, from which its seed follows.
    """
    initializer = child_initializer(initializer, name)
    if not isinstance(initializer, keras.initializers.VarianceScaling):
        return initializer

    def scaled(shape: Sequence[int], dtype: Any = None) -> tf.Tensor:
        return initializer(shape, dtype=dtype) * shape[0] ** 0.5

    # A strategy may make shards, since that one gives the same values at each call.
    scaled.gshard_initializer = initializer  # type: ignore[attr-defined]
    return scaled


def matrix_fan(
    initializer: keras.initializers.Initializer, rows: int, columns: int, name: str
) -> Callable:
    """Returns `initializer` of a `[rows, columns]` matrix, reshaped to the weight.

    Args:
        initializer: Of all weights of a layer.
        rows: Of the matrix.
        columns: Of the matrix.
        name: Name of the weight, from which its seed follows.
    """
    initializer = child_initializer(initializer, name)

    def reshaped(shape: Sequence[int], dtype: Any = None) -> tf.Tensor:
        return tf.reshape(initializer((rows, columns), dtype=dtype), shape)

    reshaped.gshard_initializer = initializer  # type: ignore[attr-defined]
    return reshaped
