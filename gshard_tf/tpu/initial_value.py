"""The first value of a variable, a part at a time."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import tensorflow as tf

from gshard_tf.compat.keras_variables import current_variable, known_shape
from gshard_tf.tpu.random_shards import NotByParts, by_parts

# Below this, a part at a time costs more than it saves. (The values are the same.)
WHOLE_BYTES = 1 << 24
# So many elements of other parts are computed at a time, and thrown away.
_CHUNK = 1 << 22


class InitialValue:
    """What a variable starts with, computed when it is asked for.

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
        self._make: Callable[[], tf.Tensor]
        if callable(value) and known and dtype is not None:
            self._make = value
        else:
            with tf.init_scope():
                made = tf.convert_to_tensor(value() if callable(value) else value)
                made = made if dtype is None else tf.cast(made, dtype)
            self._make = lambda: made
            shape, dtype = made.shape, made.dtype
        self.shape = tf.TensorShape(shape)
        self.dtype = tf.as_dtype(dtype)

    def parts(self, slices: Sequence[tuple[slice, ...]]) -> Iterator[tf.Tensor]:
        """Some parts of it, on the host, one after the other; () is the whole."""
        size = self.shape.num_elements() * self.dtype.size
        part = None
        if size > WHOLE_BYTES and all(slices):
            part = self._by_parts()
        whole = self._whole() if part is None else None
        for where in slices:
            with tf.device("CPU:0"):
                if part is not None:
                    yield tf.cast(self._cut(part, where), self.dtype)
                else:
                    yield whole[where] if where else whole

    def _whole(self) -> tf.Tensor:
        with tf.device("CPU:0"):
            return tf.cast(tf.convert_to_tensor(self._make()), self.dtype)

    def _by_parts(self) -> Callable[[int, int], tf.Tensor] | None:
        try:
            part = by_parts(self._make)
            part(0, 1)
        except NotByParts:
            return None
        return part

    def _cut(self, part: Callable, where: tuple[slice, ...]) -> tf.Tensor:
        """A box of the whole, from runs of its flat elements."""
        first, *others = where
        row = math.prod(self.shape[1:])
        wanted = [s.stop - s.start for s in others]
        if math.prod(wanted) == row:
            rows = part(first.start * row, first.stop * row)
            return tf.reshape(rows, [-1, *wanted])
        at_once = max(1, _CHUNK // row)
        found = []
        for start in range(first.start, first.stop, at_once):
            stop = min(start + at_once, first.stop)
            rows = tf.reshape(
                part(start * row, stop * row), [stop - start, *self.shape[1:]]
            )
            found.append(rows[(slice(None), *others)])
        return tf.concat(found, 0)
