"""Layouts of a step's arguments, outputs and captures."""

import dataclasses

from tensorflow.experimental import dtensor

from gshard_tf.runtime.process_group import group
from gshard_tf.sharding.sharded_variable import PlacedVariable
from gshard_tf.sharding.variable_layouts import Layouts
from gshard_tf.spmd.lowering import LoweredStep


@dataclasses.dataclass(frozen=True)
class StepLayouts:
    """The layouts of the values that enter and leave a step.

    Attributes:
        inputs: Of each argument.
        outputs: Of each output.
        captures: Of each captured variable or constant, as it is stored.
        uses: As the step uses it, where that differs; else None.
    """

    inputs: list[dtensor.Layout]
    outputs: list[dtensor.Layout]
    captures: list[dtensor.Layout]
    uses: list[dtensor.Layout | None]


def step_layouts(layouts: Layouts, step: LoweredStep) -> StepLayouts:
    """The layouts that the rules of a strategy give to a step."""
    captures, uses = [], []
    for value in step.captures:
        if isinstance(value, PlacedVariable):
            decision = layouts.of(value)
            captures.append(decision.layout)
            uses.append(decision.use)
        else:
            captures.append(dtensor.Layout.replicated(layouts.mesh, value.shape.rank))
            uses.append(None)
    outputs = [spec.shape for spec in step.results[: step.num_outputs]]
    return StepLayouts(
        [layouts.of_batch(spec.shape) for spec in step.inputs],
        [
            # Every process is given all of what comes out.
            dtensor.Layout.replicated(layouts.mesh, shape.rank)
            if group().count > 1
            else layouts.of_batch(shape)
            for shape in outputs
        ],
        captures,
        uses,
    )
