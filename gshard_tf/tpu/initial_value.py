"""The first value of a variable, one shard at a time."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import tensorflow as tf

from gshard_tf.compat.keras_variables import current_variable, known_shape
from gshard_tf.tpu.random_shards import Elements, NotShardable, shardable_initializer

# Below this, a shard at a time costs more than it saves. (The values are the same.)
WHOLE_BYTES = 1 << 24
# So many elements of other shards are computed at a time, and thrown away.
_CHUNK = 1 << 22


class InitialValue:
    """The value that a variable starts with, computed when it is first used.

    Args:
        value: As for `tf.Variable`: a value, or a function that returns it.
        shape: Its shape if known.
        dtype: Its dtype if known.

    Attributes:
        shape: Its static shape.
        dtype: Its dtype.
    """

    def __init__(self, value: Any, shape: Any = None, dtype: Any = None):
        keras_variable = current_variable()
        if callable(value) and keras_variable is not None and shape is None:
            # Keras knows the shape before there is a value.
            shape = known_shape(keras_variable)
        known = shape is not None and tf.TensorShape(shape).is_fully_defined()
        self._compute: Callable[[], tf.Tensor]
        if callable(value) and known and dtype is not None:
            self._compute = value
        else:
            with tf.init_scope():
                tensor = tf.convert_to_tensor(value() if callable(value) else value)
                tensor = tensor if dtype is None else tf.cast(tensor, dtype)
            self._compute = lambda: tensor
            shape, dtype = tensor.shape, tensor.dtype
        self.shape = tf.TensorShape(shape)
        self.dtype = tf.as_dtype(dtype)

    def shards(self, indices: Sequence[tuple[slice, ...]]) -> Iterator[tf.Tensor]:
        """Yields shards of it, on the host, one after the other; () is the whole."""
        size = self.shape.num_elements() * self.dtype.size
        elements = None
        if size > WHOLE_BYTES and all(indices):
            elements = self._elements()
        if elements is None:
            whole = self._whole()
            for index in indices:
                with tf.device("CPU:0"):
                    yield whole[index] if index else whole
            return
        for index in indices:
            with tf.device("CPU:0"):
                yield tf.cast(self._cut(elements, index), self.dtype)

    def _whole(self) -> tf.Tensor:
        with tf.device("CPU:0"):
            return tf.cast(tf.convert_to_tensor(self._compute()), self.dtype)

    def _elements(self) -> Elements | None:
        try:
            elements = shardable_initializer(self._compute)
            elements(0, 1)
        except NotShardable:
            return None
        return elements

    def _cut(self, elements: Elements, index: tuple[slice, ...]) -> tf.Tensor:
        """A box of the whole, from runs of its flat elements."""
        first, *others = index
        row = math.prod(self.shape[1:])
        sizes = [s.stop - s.start for s in others]
        if math.prod(sizes) == row:
            rows = elements(first.start * row, first.stop * row)
            return tf.reshape(rows, [-1, *sizes])
        at_once = max(1, _CHUNK // row)
        chunks = []
        for start in range(first.start, first.stop, at_once):
            stop = min(start + at_once, first.stop)
            rows = tf.reshape(
                elements(start * row, stop * row), [stop - start, *self.shape[1:]]
            )
            chunks.append(rows[(slice(None), *others)])
        return tf.concat(chunks, 0)
