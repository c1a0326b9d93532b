"""Weights that are stored in fewer bytes than they compute with."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf

STORED = ("float32", "bfloat16", "float16")


class StoredWeights(tf.Module):
    """The variables of a model as an exported one stores them.

    Matrices are rounded to a shorter type and cast back where a function that uses
    them begins, so half the bytes lie on disk and in memory between calls, and the
    computation is what it was. Vectors (scales of normalization) stay as they are.

    Args:
        variables: All variables of the model.
        dtype: One of `STORED`. "float32": nothing is changed, nor copied.

    Raises:
        ValueError: for another type.
    """

    def __init__(self, variables: Sequence[keras.Variable], dtype: str = "float32"):
        super().__init__(name="weights")
        if dtype not in STORED:
            raise ValueError(
                f"`weights` must be one of {list(STORED)}. Received: weights={dtype!r}"
            )
        self.dtype = dtype
        self._model_variables = _Untracked(variables)
        self.stored = [
            tf.Variable(tf.cast(v.value, dtype), trainable=False)
            if dtype != "float32" and _is_matrix(v)
            else v.value
            for v in variables
        ]

    def in_use(self) -> contextlib.AbstractContextManager:
        """While this is entered, a graph that is traced reads the stored values."""
        if self.dtype == "float32":
            return contextlib.nullcontext()
        pairs = [
            (variable, tf.cast(stored, variable.dtype))
            for variable, stored in zip(
                self._model_variables.value, self.stored, strict=True
            )
        ]
        return keras.StatelessScope(pairs)


class _Untracked:
    """Hides from TensorFlow the variables that are not to be saved."""

    def __init__(self, value: Any):
        self.value = list(value)


def _is_matrix(variable: keras.Variable) -> bool:
    return len(variable.shape) >= 2 and variable.dtype == "float32"
