"""Checks of the ids and labels of a batch, on the host and before the step."""

import weakref
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np

from gshard_tf.spmd.index_uses import IndexUse
from gshard_tf.spmd.lowering import LEAF

# Keras's own steps, and the parts of their batch.
_KERAS_STEPS = ("train_step", "test_step", "predict_step", "one_step_on_data")
_PARTS_OF_A_BATCH = ("x", "y", "sample_weight")


class InputRangeError(IndexError, ValueError):
    """An index out of range; TensorFlow reports it as `InvalidArgumentError`."""


class InputChecks:
    """Counts the steps whose arguments are checked.

    Args:
        steps: How many steps of each function are checked, counted from the last
            `restart`; True: every one. False or 0: none.

    Raises:
        ValueError: when it is neither.
    """

    def __init__(self, steps: bool | int):
        if not isinstance(steps, int) or steps < 0:
            raise ValueError(
                "`check_inputs` must be True, False, or the number of first steps "
                f"whose inputs are checked. Received: check_inputs={steps!r}"
            )
        self.steps = steps
        self._done: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()

    def restart(self) -> None:
        """Counts from the beginning, since other data may come now."""
        self._done.clear()

    def is_due(self, step: Any) -> bool:
        """Returns whether to check this call of `step`, and counts it."""
        if self.steps is True:
            return True
        done = self._done[step] = self._done.get(step, 0) + 1
        return done <= self.steps


def check_indices(
    uses: Sequence[IndexUse],
    arrays: Sequence[np.ndarray],
    names: Sequence[str],
    copies: int = 1,
) -> None:
    """Checks every index that a step would take.

    Args:
        uses: The operations that take them.
        arrays: The arguments of the step.
        names: The names of the arguments.
        copies: How many times as many rows the step has; each row stands for that
            many, where other processes feed theirs.

    Raises:
        InputRangeError: at the first that is out of its range.
    """
    if not uses:
        return
    if copies > 1:
        arrays = [
            np.concatenate([array] * copies) if array.ndim else array
            for array in arrays
        ]
    for use in uses:
        indices = use.indices(arrays)
        bad = (indices < 0) | (indices >= np.asarray(use.sizes))
        if bad.any():
            row, component = np.argwhere(bad)[0]
            raise InputRangeError(
                f"{use.where} needs indices from 0 to {use.sizes[component] - 1}. "
                f"Received: {indices[row, component]}, made of "
                + ", ".join(_described(names[i], arrays[i]) for i in use.places)
                + ". The step did not run. (SpmdStrategy(check_inputs=False) checks no "
                "inputs.)"
            )


def _described(name: str, array: np.ndarray) -> str:
    shape = tuple(array.shape)
    return f"{name} (shape {shape}, values from {array.min()} to {array.max()})"


def argument_names(step_name: str, arguments: Any) -> list[str]:
    """Returns the names of the tensors among the arguments of a step.

    Args:
        step_name: The name of its function.
        arguments: `(args, kwargs)`, with `lowering.LEAF` for each tensor.

    Returns:
        `"x['tokens']"` for a step of Keras, `"argument 0[1]"` for another.
    """
    names = []
    for path, leaf in keras.tree.flatten_with_path(arguments):
        if leaf is LEAF:
            names.append(_name(step_name, path))
    return names


def _name(step_name: str, path: tuple) -> str:
    kind, first, *rest = path
    if step_name in _KERAS_STEPS and kind == 0 and first == 0:
        if not rest:
            return "x"
        if isinstance(rest[0], int) and rest[0] < len(_PARTS_OF_A_BATCH):
            first, *rest = _PARTS_OF_A_BATCH[rest[0]], *rest[1:]
        else:
            first = "x"
    else:
        first = f"argument {first!r}"
    return first + "".join(f"[{key!r}]" for key in rest)
