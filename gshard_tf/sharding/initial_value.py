"""The first value of a variable, one shard at a time."""

import functools
import math
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from gshard_tf.compat.keras_variables import current_variable, known_shape
from gshard_tf.compat.tensorflow import out_of_graphs
from gshard_tf.random.random_shards import (
    Elements,
    NotShardable,
    shardable_initializer,
)
from gshard_tf.sharding.regions import Region, cut

# Below this, a shard at a time costs more than it saves. (The values are the same.)
WHOLE_BYTES = 1 << 24
# So many elements of other shards are computed at a time, and thrown away.
_CHUNK = 1 << 22


def is_stateless(initializer: Any) -> bool:
    """Returns whether an initializer gives the same values whenever it is called.

    Keras's own do, but with a seed that is a generator. So does a function that scales
    or reshapes one, and names it by its attribute `gshard_initializer`.
    """
    initializer = getattr(initializer, "gshard_initializer", initializer)
    return (
        isinstance(initializer, keras.initializers.Initializer)
        and type(initializer).__module__.startswith("keras.")
        and not isinstance(
            getattr(initializer, "seed", None), keras.random.SeedGenerator
        )
    )


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

    def whole(self) -> tf.Tensor:
        """All of it, on the host."""
        with out_of_graphs(), tf.device("CPU:0"):
            return tf.cast(tf.convert_to_tensor(self._compute()), self.dtype)

    def first(self, count: int) -> tf.Tensor:
        """Its first elements, flat, on the host; fewer where it has no more."""
        count = min(count, self.shape.num_elements())
        if self.elements is None:
            return tf.reshape(self.whole(), [-1])[:count]
        with out_of_graphs(), tf.device("CPU:0"):
            return self.elements(0, count)

    @functools.cached_property
    def elements(self) -> Elements | None:
        """Computes runs of its elements; None where only the whole can be computed.

        None for a small one, too.
        """
        size = self.shape.num_elements() * self.dtype.size
        if self.shape.rank == 0 or size <= WHOLE_BYTES:
            return None
        try:
            with out_of_graphs():
                elements = shardable_initializer(self._compute)
                elements(0, 1)
        except NotShardable:
            return None
        return elements

    def reader(self) -> Callable[[Region], np.ndarray]:
        """Returns a function that computes a region of it.

        It may hold the whole: let go of it when all shards are there.
        """
        elements = self.elements
        if elements is None:
            computed = self.whole().numpy()
            return lambda region: np.asarray(cut(computed, region))
        return lambda region: self._cut(elements, region)

    def _cut(self, elements: Elements, region: Region) -> np.ndarray:
        """A box of the whole, from short runs of its flat elements.

        TensorFlow's allocator keeps as much memory as it ever gave for a run.
        """
        (first, count), *others = region
        shape = tuple(self.shape)
        row = math.prod(shape[1:])
        box = np.empty([size for _, size in region], self.dtype.as_numpy_dtype)
        at_once = max(1, _CHUNK // row)
        for start in range(first, first + count, at_once):
            stop = min(start + at_once, first + count)
            with out_of_graphs(), tf.device("CPU:0"):
                run = tf.cast(elements(start * row, stop * row), self.dtype)
            rows = np.reshape(run, [stop - start, *shape[1:]])
            box[start - first : stop - first] = cut(rows, ((0, stop - start), *others))
        return box
