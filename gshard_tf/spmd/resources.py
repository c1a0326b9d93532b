"""The memory of resource variables on the host: written, freed, and untouched."""

import math
import mmap
import sys

import numpy as np
import tensorflow as tf

from gshard_tf.compat.tensorflow import out_of_graphs

_BITCAST = frozenset(
    getattr(tf, name)
    for name in (
        "float64 float32 float16 bfloat16 int64 int32 int16 int8 "
        "uint64 uint32 uint16 uint8 complex64 complex128"
    ).split()
)
# Linux refuses a mapping that is larger than its memory unless it is unreserved. (The
# number is missing in Python's module.)
_UNRESERVED = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
_UNRESERVED |= 0x4000 if sys.platform == "linux" else 0


def write(resource: tf.Tensor, value: tf.Tensor) -> None:
    """Makes a resource hold a value, whose memory it shares."""
    with out_of_graphs():
        tf.raw_ops.AssignVariableOp(resource=resource, value=value)


def free(resource: tf.Tensor, dtype: tf.DType) -> None:
    """Frees the memory of a resource, which keeps its static shape.

    It has no elements then, so whoever reads it all the same sees it.
    """
    with out_of_graphs(), tf.device("CPU:0"):
        tf.raw_ops.AssignVariableOp(resource=resource, value=tf.zeros([0], dtype))


def untouched(shape: tf.TensorShape, dtype: tf.DType) -> tf.Tensor:
    """A tensor of zeros that takes address space, and no memory until it is read.

    So it may be larger than the memory of the host.
    """
    dims = shape.as_list()
    with out_of_graphs(), tf.device("CPU:0"):
        if dtype not in _BITCAST:
            return tf.zeros(dims, dtype)
        size = math.prod(dims) * dtype.size
        pages = mmap.mmap(-1, max(size, 1), flags=_UNRESERVED)
        array = np.frombuffer(pages, np.uint8, size)
        # (`tf.constant` would copy it.)
        tensor = tf.experimental.dlpack.from_dlpack(array.__dlpack__())
        unit = [dtype.size] if dtype.size > 1 else []
        return tf.bitcast(tf.reshape(tensor, [*dims, *unit]), dtype)
