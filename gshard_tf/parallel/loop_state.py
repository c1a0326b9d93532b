"""Arrays that the loops of manual regions begin with."""

from typing import Any


def zeros(shape: tuple, dtype: Any, *arrays: Any) -> Any:
    """Zeros, which differ between the devices of a manual region where `arrays` do.

    jax wants the state of a loop to begin as it goes on.
    """
    from jax import numpy as jnp

    never = jnp.zeros((), bool)
    zero = sum(
        jnp.where(never, array.reshape(-1)[0], 0).astype(dtype) for array in arrays
    )
    return jnp.full(shape, zero, dtype)
