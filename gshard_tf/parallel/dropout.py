"""Dropout in manual regions, with the numbers of `gshard_tf.random`."""

from collections.abc import Sequence
from typing import Any

from gshard_tf.random.threefry import PARITY, ROTATIONS, ROUNDS


def dropped(x: Any, rate: float, seed: Any, index: Sequence[Any], shape: Any) -> Any:
    """Returns a device's part of an array after dropout, as by `keras_layers.Dropout`.

    Args:
        x: The part.
        rate: The share of values set to 0.
        seed: `[2]`, uint32.
        index: The position in the whole array of the indices of each dimension of `x`,
            1-D each.
        shape: The shape of the whole array.
    """
    import jax.numpy as jnp

    # As `gshard_tf.random.random_bits` counts: the first dimension, and the index
    # within it.
    words = [seed[0], seed[1]]
    stride = 1
    for d in reversed(range(x.ndim)):
        broadcast = [1] * x.ndim
        broadcast[d] = -1
        position = index[d].astype(jnp.uint32) * jnp.uint32(stride if d else 1)
        words[1 if d else 0] = words[1 if d else 0] + position.reshape(broadcast)
        stride = stride * shape[d] % 2**32
    bits = _rounds(seed, *words)
    uniform = (bits >> 8).astype(jnp.float32) * (1.0 / (1 << 24))
    return jnp.where(uniform >= rate, x * (1.0 / (1.0 - rate)), 0)


def _rounds(key: Any, x0: Any, x1: Any) -> Any:
    """The first word of Threefry-2x32, of a counter to which the key is added."""
    import jax.numpy as jnp

    ks = (key[0], key[1], key[0] ^ key[1] ^ jnp.uint32(PARITY))
    for i in range(ROUNDS):
        distance = ROTATIONS[(i // 4) % 2][i % 4]
        x0 = x0 + x1
        x1 = ((x1 << distance) | (x1 >> (32 - distance))) ^ x0
        if i % 4 == 3:
            s = i // 4 + 1
            x0 = x0 + ks[s % 3]
            x1 = x1 + ks[(s + 1) % 3] + jnp.uint32(s)
    return x0
