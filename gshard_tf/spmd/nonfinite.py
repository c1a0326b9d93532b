"""NaN and infinity in a step: the error, the skipped step, and the test for them."""

import dataclasses
from typing import Any

import numpy as np
import tensorflow as tf

from gshard_tf.spmd import lowering
from gshard_tf.spmd.variable import MeshVariable


class NonFiniteError(FloatingPointError, ValueError):
    """NaN or infinity in a step; TensorFlow reports it as `InvalidArgumentError`."""


@dataclasses.dataclass(frozen=True)
class SkippedStep:
    """A step that changed nothing, since it would have made NaN or infinity.

    Attributes:
        number: Which call of the step it was, from 1.
        arrays: Its arguments, flat.
        arguments: Their structure, with `lowering.LEAF` for each.
        broken: The variables that would not have been finite.
    """

    number: int
    arrays: list[np.ndarray]
    arguments: Any
    broken: list[MeshVariable]

    def call_arguments(self) -> tuple[tuple, dict]:
        """The arguments of the call, `(args, kwargs)`."""
        return lowering.pack(self.arguments, self.arrays)


def kept_finite(old: list[Any], new: list[Any]) -> list[Any]:
    """Returns the new values, or all old ones if any is not finite; and which is not.

    Args:
        old: Traced values of the variables that a step updates, before it.
        new: The same after it.

    Returns:
        The values that stay, and a boolean for each variable, `[number]`, last.
    """
    from jax import numpy as jnp

    each = [
        # What was not finite before (a metric that begins at infinity) may stay so.
        jnp.any(~jnp.isfinite(after) & jnp.isfinite(before))
        if jnp.issubdtype(after.dtype, jnp.inexact)
        else jnp.bool_(False)
        for before, after in zip(old, new, strict=True)
    ]
    broken = jnp.stack(each) if each else jnp.zeros([0], bool)
    stays = jnp.any(broken)
    kept = [
        jnp.where(stays, before, after) for before, after in zip(old, new, strict=True)
    ]
    return [*kept, broken]


def is_finite(values: Any) -> bool:
    """Returns whether a nest of arrays and tensors has neither NaN nor infinity."""
    return all(
        _is_finite_array(value)
        for value in tf.nest.flatten(values, expand_composites=True)
        if hasattr(value, "dtype")
    )


def _is_finite_array(value: Any) -> bool:
    dtype = np.dtype(getattr(value.dtype, "as_numpy_dtype", value.dtype))
    # numpy sees bfloat16 as a type of its own kind, "V".
    if dtype.kind not in "fcV":
        return True
    array = np.asarray(value)
    if dtype.kind == "V":
        array = array.astype(np.float32)
    return bool(np.all(np.isfinite(array)))
