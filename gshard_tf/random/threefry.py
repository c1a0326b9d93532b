"""Counter-based random numbers (Threefry) that partition.

`tf.random.stateless_uniform` becomes an XLA operation that the partitioner does not
split: every device would make the global tensor. Here each number is a function of the
seed and its own position, made of elementwise operations. So every device makes only
its shard, and the numbers do not depend on the number of devices.
"""

import contextlib
import contextvars
from collections.abc import Iterator, Sequence
from typing import Any

import tensorflow as tf

# Threefry-2x32 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011).
# Its authors found 13 rounds to pass every test of randomness and recommend 20 as a
# margin for the cautious. Dropout and routing need no margin, and every round is
# operations to trace, compile and run in every layer.
ROUNDS = 13
ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
PARITY = 0x1BD11BDA

# Number of the microbatch, and their count.
_MICROBATCH: contextvars.ContextVar[tuple[Any, int] | None] = contextvars.ContextVar(
    "gshard_tf_microbatch", default=None
)


@contextlib.contextmanager
def microbatch(number: Any, count: int) -> Iterator[None]:
    """Context in which tensors have the random numbers of rows of a larger batch.

    Examples are those at the positions `number`, `number + count`, `number + 2 *
    count`, ... of that batch.

    Args:
        number: Scalar int32 tensor in [0, count).
        count: Into how many microbatches the batch is cut.
    """
    token = _MICROBATCH.set((number, count))
    try:
        yield
    finally:
        _MICROBATCH.reset(token)


def threefry2x32(
    key: tuple[Any, Any], counter: tuple[Any, Any], rounds: int = ROUNDS
) -> tuple[tf.Tensor, tf.Tensor]:
    """Applies the Threefry-2x32 block function to uint32 tensors that broadcast."""
    ks = _schedule(key)
    return _rounds(ks, counter[0] + ks[0], counter[1] + ks[1], rounds)


def _schedule(key: tuple[Any, Any]) -> tuple[Any, Any, Any]:
    return key[0], key[1], key[0] ^ key[1] ^ tf.constant(PARITY, tf.uint32)


def _rounds(
    ks: tuple[Any, Any, Any], x0: Any, x1: Any, rounds: int
) -> tuple[tf.Tensor, tf.Tensor]:
    for i in range(rounds):
        distance = ROTATIONS[(i // 4) % 2][i % 4]
        x0 = x0 + x1
        left = tf.bitwise.left_shift(x1, tf.constant(distance, tf.uint32))
        right = tf.bitwise.right_shift(x1, tf.constant(32 - distance, tf.uint32))
        x1 = (left | right) ^ x0
        if i % 4 == 3:
            s = i // 4 + 1
            x0 = x0 + ks[s % 3]
            x1 = x1 + ks[(s + 1) % 3] + tf.constant(s, tf.uint32)
    return x0, x1


@tf.autograph.experimental.do_not_convert
def random_bits(
    seed: Any,
    shape: Sequence[Any],
    batch_dim: int | None = 0,
    positions: tf.Tensor | None = None,
    rows: int | tf.Tensor = 1,
) -> tf.Tensor:
    """Returns uint32 bits of `shape`, a function of `seed` and position alone.

    If `tf.distribute` gives each of several replicas its own examples, the position is
    that in the global batch, so the replicas draw the same numbers as one device with
    all examples.

    Args:
        seed: Integer tensor of shape `[2]`, as `keras.random.SeedGenerator.next()`
            returns. In a step it is state or an argument; a constant would let the
            compiler compute the numbers in advance, all of them for every device.
        shape: A list with one int or scalar int tensor per dimension. The product
            of all dimensions but the first must stay below 2**32.
        batch_dim: The dimension of examples. None: all replicas draw the same
            numbers.
        positions: The positions along the first dimension, 1-D ints, where they are
            not 0, 1, 2, ...: numbers that stay with rows that change places.
        rows: How many neighbors along `batch_dim` are of one example, which is what
            `microbatch` counts.
    """
    shape = list(shape)
    parts, start, of_batch = 1, None, None
    if batch_dim is not None and shape:
        if (found := _MICROBATCH.get()) is not None:
            number, parts = found
            of_batch = (number, parts, rows)
        context = tf.distribute.get_replica_context()
        if context is not None and context.num_replicas_in_sync > 1:
            # On a TPU the replica's number is a tensor.
            replica = tf.cast(context.replica_id_in_sync_group, tf.uint32)
            start = replica * tf.cast(shape[batch_dim] * parts, tf.uint32)
            parts *= context.num_replicas_in_sync
    return _random_bits(
        tf.convert_to_tensor(seed),
        shape,
        batch_dim=batch_dim,
        parts=parts,
        start=start,
        of_batch=of_batch,
        first=positions,
    )


# A function of its own, so that layers of one shape share one trace.
@tf.function(autograph=False)
def _random_bits(
    seed: tf.Tensor,
    shape: list[Any],
    batch_dim: int | None,
    parts: int,
    start: tf.Tensor | None,
    of_batch: tuple[tf.Tensor, int, int | tf.Tensor] | None,
    first: tf.Tensor | None,
) -> tf.Tensor:
    words = tf.cast(seed, tf.uint32)
    ks = _schedule((words[0], words[1]))
    # The position as two 32-bit words: the first dimension, and the index within it,
    # so that tensors of more than 2**32 elements do not repeat. Each dimension's
    # range is 1-D and is added to a key, one by one: added to each other, they would
    # be a constant of the global shape, which no partitioner splits.
    x0, x1 = ks[0], ks[1]
    rank = len(shape)

    def positions(i: int) -> tf.Tensor:
        index = tf.range(shape[i]) if first is None or i > 0 else first
        index = tf.cast(index, tf.uint32)
        if i != batch_dim:
            return index
        if of_batch is not None:
            number, count, rows = (tf.cast(x, tf.uint32) for x in of_batch)
            index = (index // rows * count + number) * rows + index % rows
        return index if start is None else index + start

    stride = tf.ones([], tf.uint32)
    for i in reversed(range(1, rank)):
        x1 = x1 + tf.reshape(positions(i) * stride, [-1] + [1] * (rank - 1 - i))
        stride = stride * tf.cast(shape[i], tf.uint32)
        if i == batch_dim and parts > 1:
            stride = stride * tf.cast(parts, tf.uint32)
    if shape:
        x0 = x0 + tf.reshape(positions(0), [-1] + [1] * (rank - 1))
    # The first round adds the two words, which gives the whole shape.
    return _rounds(ks, x0, x1, ROUNDS)[0]


@tf.autograph.experimental.do_not_convert
def uniform(
    seed: Any,
    shape: Sequence[Any],
    batch_dim: int | None = 0,
    positions: tf.Tensor | None = None,
    rows: int | tf.Tensor = 1,
) -> tf.Tensor:
    """Returns float32 numbers in [0, 1), a function of `seed` and position alone.

    Args:
        seed: Integer tensor of shape `[2]`.
        shape: A list with one int or scalar int tensor per dimension.
        batch_dim: See `random_bits`.
        positions: See `random_bits`.
        rows: See `random_bits`.
    """
    bits = random_bits(seed, shape, batch_dim, positions, rows)
    # 24 bits fill a float32's mantissa, so every value is exact and below 1. The
    # detour by int32 is because few backends convert uint32 to float.
    top = tf.cast(tf.bitwise.right_shift(bits, tf.constant(8, tf.uint32)), tf.int32)
    return tf.cast(top, tf.float32) * (1.0 / (1 << 24))
