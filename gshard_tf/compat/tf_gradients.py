"""Reads of a variable whose gradient is a dense tensor, however rows are looked up.

TensorFlow gives the gradient of a look-up as `tf.IndexedSlices`: the rows that were
read, as often as they were read. Optimizers then find out which rows those are
(`tf.unique`), so that shapes depend on values, which a partitioned program cannot have;
or they treat each reading of a row by itself. Here a gradient becomes dense where it
reaches the variable, whatever operation made slices of it.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager

import tensorflow as tf

# Private API: what tapes know of an operation, by which TensorFlow itself records the
# reading of a variable; `tf.custom_gradient` would keep the graph of every reading
# alive as long as the process. On an upgrade, check that a record of the same tensors
# replaces the one before, as `ResourceVariable._read_variable_op` needs it to.
from tensorflow.python.eager import record

_GRADIENT = "GshardDenseGradient"


def densified(gradient: tf.Tensor | tf.IndexedSlices) -> tf.Tensor:
    """The sum of slices as a tensor of the whole shape; a tensor is left as it is.

    Slices of indices out of range are left out, as XLA's scatter does. Half precision
    is summed in float32.
    """
    if not isinstance(gradient, tf.IndexedSlices):
        return gradient
    dtype = gradient.dtype
    values = gradient.values
    if dtype in (tf.float16, tf.bfloat16):
        values = tf.cast(values, tf.float32)
    # An index vector per slice: a scatter in its explicit form.
    sums = tf.scatter_nd(
        gradient.indices[:, None],
        values,
        tf.cast(gradient.dense_shape, gradient.indices.dtype),
    )
    return tf.cast(sums, dtype)


@tf.RegisterGradient(_GRADIENT)
def _dense_gradient(op: tf.Operation, gradient: tf.Tensor) -> tf.Tensor:
    del op
    return densified(gradient)


def with_dense_gradient(
    read: Callable[[], tf.Tensor], op_type: str, source: tf.Tensor
) -> tf.Tensor:
    """`read()` in a graph, with a dense gradient.

    Args:
        read: Makes one operation of `op_type`, of which the result has the gradient of
            `source`.
        op_type: Such as `"ReadVariableOp"`.
        source: What is read: a tensor, or the handle of a variable.
    """
    # For gradients of a graph (of loops, branches and functions), then for tapes.
    graph = tf.compat.v1.get_default_graph()
    with graph.gradient_override_map({op_type: _GRADIENT}):
        value = read()
    record.record_operation(
        op_type,
        [value],
        [source],
        backward_function=lambda gradient: [densified(gradient)],
        forward_function=lambda tangent: [tangent],
    )
    return value


def gradient_scope() -> str:
    """The name scope of gradients of what is traced now, as tapes name it.

    For the gradient of a `tf.custom_gradient`, which is traced elsewhere.
    """
    return f"gradient_tape/{tf.get_current_name_scope()}".rstrip("/") + "/"


def stop_recording() -> AbstractContextManager[None]:
    """Context whose operations are on no gradient tape, as in `tf.recompute_grad`.

    Relies on: `record.stop_recording`. On an upgrade, watch: it still pauses all tapes
    of the thread, not only the innermost.
    """
    return record.stop_recording()
