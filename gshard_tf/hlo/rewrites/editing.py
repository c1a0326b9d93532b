"""Replacement of instructions of an `HloModuleProto` by others."""

from collections.abc import Callable, Sequence
from typing import Any

from gshard_tf.compat.xla_protos import (
    HloComputationProto,
    HloModuleProto,
    LiteralProto,
    ProgramShapeProto,
    xla_data_pb2,
)
from gshard_tf.compat.xla_protos import HloInstructionProto as Instruction
from gshard_tf.compat.xla_protos import ShapeProto as Shape


def next_instruction_id(module: HloModuleProto) -> int:
    """Returns an id that no instruction of a module has, nor any larger one.

    Since TensorFlow 2.21 the upper half of an id is its computation's, and XLA tells
    the instructions of a computation apart by the lower half alone.
    """
    return 1 + max(
        instruction.id & 0xFFFFFFFF
        for computation in module.computations
        for instruction in computation.instructions
    )


class Editor:
    """Emits instructions before the one that is being edited."""

    def __init__(self, module: HloModuleProto):
        self._next_id = next_instruction_id(module)
        self._next_computation = 1 + max(c.id for c in module.computations)
        self._known: dict[int, Instruction] = {}
        self._emitted: list[Instruction] = []
        # The instruction that is being edited.
        self._origin: Instruction = Instruction()
        # New computations of the module, by element type.
        self.additions: dict[int, HloComputationProto] = {}

    def operands(self, instruction: Instruction) -> list[Instruction]:
        """Returns the operands of an instruction."""
        return [self._known[i] for i in instruction.operand_ids]

    def emit(
        self, opcode: str, shape: Shape, operands: Sequence[Instruction], **fields: Any
    ) -> Instruction:
        """Emits a new instruction, with the metadata of the one that is being edited.

        Args:
            opcode: Its opcode.
            shape: Its shape.
            operands: Its operands.
            **fields: Other fields of its message; a message or a list is copied.
        """
        new = Instruction(
            name=f"{opcode}.{self._next_id}",
            opcode=opcode,
            id=self._next_id,
            operand_ids=[operand.id for operand in operands],
            metadata=self._origin.metadata,
            **fields,
        )
        new.shape.CopyFrom(shape)
        self._add(new)
        return new

    def copy(
        self, instruction: Instruction, operands: Sequence[Instruction], shape: Shape
    ) -> Instruction:
        """Emits the same operation on other operands."""
        new = Instruction()
        new.CopyFrom(instruction)
        new.id = self._next_id
        new.name = f"{instruction.opcode}.{self._next_id}"
        new.shape.CopyFrom(shape)
        new.operand_ids[:] = [operand.id for operand in operands]
        self._add(new)
        return new

    def constant(self, number: int, element_type: int) -> Instruction:
        """Emits a scalar constant."""
        scalar = array_shape(xla_data_pb2.S32, [])
        constant = self.emit(
            "constant",
            scalar,
            [],
            literal=LiteralProto(shape=scalar, s32s=[number]),
        )
        if element_type == xla_data_pb2.S32:
            return constant
        return self.emit("convert", array_shape(element_type, []), [constant])

    def sum_over_first(self, value: Instruction) -> Instruction:
        """Emits the sum of `value` over its first dimension."""
        element_type = value.shape.element_type
        return self.emit(
            "reduce",
            array_shape(element_type, value.shape.dimensions[1:]),
            [value, self.constant(0, element_type)],
            dimensions=[0],
            called_computation_ids=[self._addition(element_type).id],
        )

    def _addition(self, element_type: int) -> HloComputationProto:
        if element_type in self.additions:
            return self.additions[element_type]
        scalar = array_shape(element_type, [])
        first, second, root = range(self._next_id, self._next_id + 3)
        self._next_id += 3
        computation = HloComputationProto(
            name=f"add.{root}",
            id=self._next_computation,
            root_id=root,
            program_shape=ProgramShapeProto(
                parameters=[scalar, scalar], result=scalar, parameter_names=["x", "y"]
            ),
        )
        self._next_computation += 1
        for number, new in enumerate((first, second)):
            computation.instructions.add(
                name=f"parameter.{new}",
                opcode="parameter",
                id=new,
                parameter_number=number,
                shape=scalar,
            )
        computation.instructions.add(
            name=f"add.{root}",
            opcode="add",
            id=root,
            operand_ids=[first, second],
            shape=scalar,
        )
        self.additions[element_type] = computation
        return computation

    def _add(self, new: Instruction) -> None:
        self._next_id += 1
        self._known[new.id] = new
        self._emitted.append(new)

    def edit(
        self,
        computation: HloComputationProto,
        replace: Callable[["Editor", Instruction], Instruction | None],
    ) -> int:
        """Calls `replace(editor, instruction)` for each instruction, in order.

        Its result replaces the instruction from then on; None keeps it.

        Returns:
            The number of replaced instructions.
        """
        instead: dict[int, int] = {}
        self._known, self._emitted = {}, []
        for old in computation.instructions:
            old.operand_ids[:] = [instead.get(i, i) for i in old.operand_ids]
            old.control_predecessor_ids[:] = [
                instead.get(i, i) for i in old.control_predecessor_ids
            ]
            self._known[old.id] = self._origin = old
            new = replace(self, old)
            if new is None:
                self._emitted.append(old)
            else:
                instead[old.id] = new.id
        if not instead:
            return 0
        emitted = [Instruction.FromString(i.SerializeToString()) for i in self._emitted]
        del computation.instructions[:]
        computation.instructions.extend(emitted)
        computation.root_id = instead.get(computation.root_id, computation.root_id)
        return len(instead)


def edit_module(
    module: HloModuleProto,
    replace: Callable[[Editor, Instruction], Instruction | None],
    outside_manual: bool = False,
) -> int:
    """Edits each computation of a module; returns the number of replacements.

    Args:
        module: The module.
        replace: See `Editor.edit`.
        outside_manual: Whether manual regions stay as they are. Each device runs its
            own part there, so no sharding may be set.
    """
    editor = Editor(module)
    inside = manual_instructions(module) if outside_manual else {}
    replaced = 0
    for computation in module.computations:
        manual: set[int] = inside.get(computation.id, set())

        def replace_outside(editor, old, manual=manual):
            return None if old.id in manual else replace(editor, old)

        replaced += editor.edit(computation, replace_outside)
    if editor.additions:
        # A computation precedes those that call it.
        computations = [*editor.additions.values(), *module.computations]
        computations = [type(c).FromString(c.SerializeToString()) for c in computations]
        del module.computations[:]
        module.computations.extend(computations)
    return replaced


def manual_instructions(module: HloModuleProto) -> dict[int, set[int]]:
    """Returns the ids of the instructions in manual regions, by their computation's id.

    A region begins where arrays become a device's part, and ends where they are whole
    again. What it calls is in it.
    """
    inside: dict[int, set[int]] = {}
    called: set[int] = set()
    # A computation precedes those that call it.
    for computation in reversed(module.computations):
        begun: set[int] = set()
        manual = inside.setdefault(computation.id, set())
        for instruction in computation.instructions:
            if instruction.custom_call_target == "SPMDFullToShardShape":
                begun.add(instruction.id)
            elif computation.id in called or (
                instruction.custom_call_target != "SPMDShardToFullShape"
                and any(i in begun or i in manual for i in instruction.operand_ids)
            ):
                manual.add(instruction.id)
                called.update(instruction.called_computation_ids)
    return inside


def array_shape(element_type: int, dimensions: Sequence[int]) -> Shape:
    """Returns the shape of a dense array in row-major layout."""
    shape = Shape(element_type=element_type, dimensions=dimensions)
    shape.is_dynamic_dimension.extend([False] * len(dimensions))
    shape.layout.minor_to_major.extend(reversed(range(len(dimensions))))
    return shape


def resized(shape: Shape, dimension: int, size: int) -> Shape:
    """Returns `shape` with another size along one dimension."""
    dimensions = list(shape.dimensions)
    dimensions[dimension] = size
    return array_shape(shape.element_type, dimensions)
