"""Permutations that sort, as functions of jax."""

from typing import Any


def stable_order(keys: Any, largest: int) -> Any:
    """The permutation that sorts `keys` `[R]`, 0 to `largest`; equals stay in order."""
    from jax import numpy as jnp

    rows = keys.shape[0]
    if not isinstance(rows, int) or (largest + 1) * rows >= 1 << 31:
        return jnp.argsort(keys, stable=True)
    # Of one array: a sort of two takes longer, and XLA's partitioner stops at one in a
    # manual region. A stable sort becomes one of two on a TPU; these keys are distinct.
    distinct = keys.astype(jnp.int32) * rows + jnp.arange(rows)
    return jnp.sort(distinct, stable=False) % rows


def inverse(order: Any) -> Any:
    """The inverse of a permutation `[R]`."""
    from jax import numpy as jnp

    place = jnp.arange(order.shape[0], dtype=jnp.int32)
    return jnp.zeros_like(place).at[order].set(place, unique_indices=True)
