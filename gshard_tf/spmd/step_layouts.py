"""Layouts of a step's arguments, outputs and captures."""

import dataclasses

from gshard_tf.runtime.process_group import group
from gshard_tf.sharding.mesh_layout import MeshLayout
from gshard_tf.sharding.sharded_variable import MeshVariableBase
from gshard_tf.sharding.variable_layouts import VariableLayouts
from gshard_tf.spmd.lowering import LoweredStep


@dataclasses.dataclass(frozen=True)
class StepLayouts:
    """The layouts of the values that enter and leave a step.

    Attributes:
        inputs: Of each argument.
        outputs: Of each output.
        captures: Of each captured variable or constant, as it is stored.
        compute: The layout in which the step computes with each capture, where it is
            not the one in which it is stored; else None.
    """

    inputs: list[MeshLayout]
    outputs: list[MeshLayout]
    captures: list[MeshLayout]
    compute: list[MeshLayout | None]


def step_layouts(layouts: VariableLayouts, step: LoweredStep) -> StepLayouts:
    """The layouts that the rules of a strategy give to a step."""
    captures: list[MeshLayout] = []
    compute: list[MeshLayout | None] = []
    for value in step.captures:
        if isinstance(value, MeshVariableBase):
            decision = layouts.layout_for(value)
            captures.append(decision.storage)
            compute.append(decision.compute)
        else:
            captures.append(MeshLayout.replicated(layouts.mesh, value.shape.rank))
            compute.append(None)
    outputs = [spec.shape for spec in step.results[: step.num_outputs]]
    layouts.note_batch([spec.shape for spec in step.inputs])
    return StepLayouts(
        [layouts.batch_layout(spec.shape) for spec in step.inputs],
        [
            # Every process is given all of what comes out.
            MeshLayout.replicated(layouts.mesh, shape.rank)
            if group().count > 1
            else layouts.batch_layout(shape)
            for shape in outputs
        ],
        captures,
        compute,
    )
