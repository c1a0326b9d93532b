"""A run of elements of a random tensor, without the rest of it.

TensorFlow's stateless random operations count: on a CPU, element `i` of the result
depends on the seed and `i` alone (Philox). So the elements that an initializer would
put into one shard of a weight can be computed by themselves, and are exactly those of
the whole.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf

# How far the counter moves with each group of four elements. (A truncated normal sets
# aside many tries for each.) On an upgrade, watch `test_initial_value.py`.
_COUNTS = {
    "StatelessRandomUniformV2": 1,
    "StatelessRandomNormalV2": 1,
    "StatelessTruncatedNormalV2": 256,
}
_GROUP = 4
_PHILOX = 1
_AUTOMATIC = 3  # Philox on a CPU
_SCALED_BY = {"Mul": tf.multiply, "AddV2": tf.add, "Sub": tf.subtract}
_UNCHANGED = frozenset({"Identity", "Reshape"})


# `elements(start, stop)`: a run of elements of a flat tensor.
Elements = Callable[[int, int], tf.Tensor]


class NotShardable(Exception):
    """The function computes its value in a way that only gives the whole."""


def shardable_initializer(compute: Callable[[], tf.Tensor]) -> Elements:
    """Traces a function that computes a tensor of random numbers or of one number.

    Returns:
        `elements(start, stop)`: those elements of the flat tensor, on the host.

    Raises:
        NotShardable: when it does more than scaling, shifting and reshaping them.
    """
    with tf.device("CPU:0"):
        traced = tf.compat.v1.wrap_function(compute, [])
        if traced.captured_inputs or len(traced.outputs) != 1:
            raise NotShardable
        [output] = traced.outputs
        scalars: dict[int, tf.Tensor] = {}
        _check(output, output.shape.num_elements(), scalars)
        keys = list(scalars)
        values = traced.prune([], [scalars[key] for key in keys])() if keys else []
    known = dict(zip(keys, values, strict=True))
    return lambda start, stop: _elements(output, start, stop, known)


def _check(tensor: tf.Tensor, size: int, scalars: dict[int, tf.Tensor]) -> None:
    """Raises unless runs of a tensor of `size` elements can be computed.

    Adds the scalars that they depend on to `scalars`.
    """
    op = tensor.op
    if tensor.shape.num_elements() != size:
        raise NotShardable
    if op.type in _COUNTS and tensor.dtype == tf.float32:
        needed = op.inputs[1:]  # key, counter, algorithm
    elif op.type == "Fill":
        needed = [op.inputs[1]]
    elif op.type in _UNCHANGED:
        return _check(op.inputs[0], size, scalars)
    elif op.type in _SCALED_BY:
        big, needed = _big_and_scalar(op)
        _check(big, size, scalars)
        needed = [needed]
    else:
        raise NotShardable
    scalars.update({id(each): each for each in needed})
    return None


def _big_and_scalar(op: Any) -> tuple[tf.Tensor, tf.Tensor]:
    left, right = op.inputs
    if right.shape.rank == 0:
        return left, right
    if left.shape.rank == 0:
        return right, left
    raise NotShardable


def _elements(
    tensor: tf.Tensor, start: int, stop: int, known: dict[int, tf.Tensor]
) -> tf.Tensor:
    op = tensor.op
    if op.type in _UNCHANGED:
        return _elements(op.inputs[0], start, stop, known)
    if op.type == "Fill":
        return tf.fill([stop - start], known[id(op.inputs[1])])
    if op.type in _SCALED_BY:
        values = [
            known[id(x)] if id(x) in known else _elements(x, start, stop, known)
            for x in op.inputs
        ]
        return _SCALED_BY[op.type](*values)
    key, counter, algorithm = (known[id(x)] for x in op.inputs[1:])
    if int(algorithm) not in (_PHILOX, _AUTOMATIC):
        raise NotShardable
    skipped = start // _GROUP
    numbers = getattr(tf.raw_ops, op.type)(
        shape=[stop - skipped * _GROUP],
        key=key,
        counter=_later(counter.numpy(), skipped * _COUNTS[op.type]),
        alg=_PHILOX,
        dtype=tensor.dtype,
    )
    return numbers[start - skipped * _GROUP :]


def _later(counter: np.ndarray, by: int) -> np.ndarray:
    """Returns a counter of 128 bits, low half first, `by` steps further."""
    total = int(counter[0]) + (int(counter[1]) << 64) + by
    return np.array([total % 2**64, (total >> 64) % 2**64], np.uint64)
