"""A step of an abstract model -> one HLO module whose state are its arguments."""

import dataclasses
from collections.abc import Callable
from typing import Any

import tensorflow as tf

from gshard_tf.spmd import lowering
from gshard_tf.spmd.abstract import AbstractExtended, standing_for


def lower_abstract(
    extended: AbstractExtended, fn: Callable[..., Any], arguments: Any
) -> lowering.LoweredStep:
    """Traces `fn(*arguments)` and lowers it.

    Args:
        extended: Of the strategy in whose scope the variables were made.
        fn: The step, `model.train_step` say.
        arguments: A nest of `tf.TensorSpec` of static shapes.

    Returns:
        The step, whose captures are all the variables of the strategy, then constants.
    """
    specs = tf.nest.flatten(arguments)
    variables = list(extended.variables)
    state = [tf.TensorSpec(v.shape, v.dtype) for v in variables]
    updates: list[int] = []

    def step(*tensors):
        inputs, values = tensors[: len(specs)], tensors[len(specs) :]
        with standing_for(variables, list(values)) as traced:
            outputs = extended.call_fn(
                fn, tf.nest.pack_sequence_as(arguments, list(inputs)), {}
            )
            # While they still stand for tensors: outputs may hold variables.
            outputs = lowering.as_results(outputs)
        updates[:] = sorted(traced.assigned)
        return outputs, [traced.assigned[i] for i in updates]

    function, structure = lowering.trace(step, [*specs, *state])
    made = len(extended.variables) - len(variables)
    if made:
        raise ValueError(
            f"The step makes {made} variables when it is traced, such as "
            f"{extended.variables[-1].path!r}. Build the model, its optimizer and its "
            "metrics completely in the function that makes it."
        )
    lowered = lowering.lower(function, structure)
    return dataclasses.replace(
        lowered,
        inputs=lowered.inputs[: len(specs)],
        captures=[*variables, *lowered.captures],
        num_outputs=lowered.num_outputs - len(updates),
        updates=updates,
        structure=structure[0],
    )
