"""TensorFlow graphs that XLA compiles: whether it does, and its operations."""

from collections.abc import Sequence

import tensorflow as tf

# Public in XLA, not in TensorFlow; Keras's backend takes it from there, too.
from tensorflow.compiler.tf2xla.python.xla import optimization_barrier as _barrier
from tensorflow.python.ops import control_flow_util


def is_compiled(graph: tf.Graph) -> bool:
    """Returns whether XLA is going to compile a graph that is being traced.

    Relies on: `control_flow_util.GraphOrParentsInXlaContext`. On an upgrade, watch: it
    is still True in functions within a `tf.function(jit_compile=True)`, and False in
    one without.
    """
    return control_flow_util.GraphOrParentsInXlaContext(graph)


def optimization_barrier(tensors: Sequence[tf.Tensor]) -> list[tf.Tensor]:
    """Returns tensors that XLA computes nothing from before it has all of them.

    Relies on: `tf2xla.optimization_barrier`, for graphs that XLA compiles. On an
    upgrade, watch: the compiled program has an `opt-barrier`.
    """
    results = list(_barrier(*tensors))
    for tensor, result in zip(tensors, results, strict=True):
        result.set_shape(tensor.shape)
    return results
