"""Operations of XLA in graphs of TensorFlow."""

from collections.abc import Sequence

import tensorflow as tf

# Public in XLA, not in TensorFlow; Keras's backend takes it from there, too.
from tensorflow.compiler.tf2xla.python.xla import optimization_barrier as _barrier


def optimization_barrier(tensors: Sequence[tf.Tensor]) -> list[tf.Tensor]:
    """Returns tensors that XLA computes nothing from before it has all of them.

    Relies on: `tf2xla.optimization_barrier`, for graphs that XLA compiles. On an
    upgrade, watch: the compiled program has an `opt-barrier`.
    """
    results = list(_barrier(*tensors))
    for tensor, result in zip(tensors, results, strict=True):
        result.set_shape(tensor.shape)
    return results
