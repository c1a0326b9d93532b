"""A part of a random tensor, without the rest of it.

TensorFlow's stateless random operations count: on a CPU, element `i` of the result
depends on the seed and `i` alone (Philox). So what an initializer would put into one
part of a weight can be computed by itself, and is exactly what the whole would hold
there.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf

# How far the counter moves with each group of four elements. (A truncated normal sets
# aside many tries for each.) On an upgrade, `test_initial_value.py` tells.
_COUNTS = {
    "StatelessRandomUniformV2": 1,
    "StatelessRandomNormalV2": 1,
    "StatelessTruncatedNormalV2": 256,
}
_GROUP = 4
_PHILOX = 1
_OF_THE_DEVICE = 3  # which is Philox on a CPU
_SCALED_BY = {"Mul": tf.multiply, "AddV2": tf.add, "Sub": tf.subtract}
_UNCHANGED = frozenset({"Identity", "Reshape"})


class NotByParts(Exception):
    """The function computes its value in a way that has no parts."""


def by_parts(make: Callable[[], tf.Tensor]) -> Callable[[int, int], tf.Tensor]:
    """Traces a function that makes a tensor of random numbers or of one number.

    Returns:
        `part(start, stop)`: those elements of the flat tensor, on the host.

    Raises:
        NotByParts: when it does more than scaling, shifting and reshaping them.
    """
    with tf.device("CPU:0"):
        traced = tf.compat.v1.wrap_function(make, [])
        if traced.captured_inputs or len(traced.outputs) != 1:
            raise NotByParts
        [output] = traced.outputs
        scalars: dict[int, tf.Tensor] = {}
        _check(output, output.shape.num_elements(), scalars)
        keys = list(scalars)
        values = traced.prune([], [scalars[key] for key in keys])() if keys else []
    known = dict(zip(keys, values, strict=True))
    return lambda start, stop: _part(output, start, stop, known)


def _check(tensor: tf.Tensor, size: int, scalars: dict[int, tf.Tensor]) -> None:
    """Whether a tensor of `size` elements has parts; notes what else it needs."""
    op = tensor.op
    if tensor.shape.num_elements() != size:
        raise NotByParts
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
        raise NotByParts
    scalars.update({id(each): each for each in needed})
    return None


def _big_and_scalar(op: Any) -> tuple[tf.Tensor, tf.Tensor]:
    left, right = op.inputs
    if right.shape.rank == 0:
        return left, right
    if left.shape.rank == 0:
        return right, left
    raise NotByParts


def _part(
    tensor: tf.Tensor, start: int, stop: int, known: dict[int, tf.Tensor]
) -> tf.Tensor:
    op = tensor.op
    if op.type in _UNCHANGED:
        return _part(op.inputs[0], start, stop, known)
    if op.type == "Fill":
        return tf.fill([stop - start], known[id(op.inputs[1])])
    if op.type in _SCALED_BY:
        values = [
            known[id(x)] if id(x) in known else _part(x, start, stop, known)
            for x in op.inputs
        ]
        return _SCALED_BY[op.type](*values)
    key, counter, algorithm = (known[id(x)] for x in op.inputs[1:])
    if int(algorithm) not in (_PHILOX, _OF_THE_DEVICE):
        raise NotByParts
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
    """A counter of 128 bits, low half first, some steps further."""
    total = int(counter[0]) + (int(counter[1]) << 64) + by
    return np.array([total % 2**64, (total >> 64) % 2**64], np.uint64)
