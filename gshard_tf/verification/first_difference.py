"""Finds the first instruction that differs, by making intermediate values results.

The results of a module show that something differs. To find the instruction, some
instructions become results too, on both sides; from one that differs, the search
proceeds to its operands, until all of these are equal.
"""

import dataclasses
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import tensorflow as tf

from gshard_tf.compat.xla_protos import (
    HloInstructionProto,
    HloModuleProto,
    xla_data_pb2,
)
from gshard_tf.hlo.rewrites.editing import next_instruction_id
from gshard_tf.spmd import lowering
from gshard_tf.verification.tolerances import Measure

# The largest number of intermediate results of one compilation, and of their bytes.
_OBSERVED = 48
_BYTES = 1 << 30
_ROUNDS = 8
# The number of differing results that the search starts from.
_ENDS = 8

_LEAVES = ("parameter", "constant", "iota", "partition-id")
_INNER = ("while", "conditional", "call")
_DTYPES = {
    getattr(xla_data_pb2, name): dtype
    for name, dtype in {
        "PRED": tf.bool,
        "S8": tf.int8,
        "S16": tf.int16,
        "S32": tf.int32,
        "S64": tf.int64,
        "U8": tf.uint8,
        "U16": tf.uint16,
        "U32": tf.uint32,
        "U64": tf.uint64,
        "F16": tf.float16,
        "BF16": tf.bfloat16,
        "F32": tf.float32,
        "F64": tf.float64,
        "C64": tf.complex64,
        "C128": tf.complex128,
    }.items()
}

# Runs a step on both sides and compares its results, intermediate ones included.
Compare = Callable[[lowering.LoweredStep], list[Measure]]


@dataclasses.dataclass(frozen=True)
class FirstDifference:
    """The first instruction that differs.

    Attributes:
        instruction: The HLO instruction.
        measure: The size of the difference.
        inside: The opcode of the loop or branch that it is a result of, or "".
        certain: Whether all its operands were equal.
    """

    instruction: HloInstructionProto
    measure: Measure
    inside: str
    certain: bool


class EntryGraph:
    """The instructions of a module's entry computation.

    Args:
        hlo: A serialized `HloModuleProto`.
    """

    def __init__(self, hlo: bytes):
        self.proto = HloModuleProto.FromString(hlo)
        [self.entry] = [
            computation
            for computation in self.proto.computations
            if computation.id == self.proto.entry_computation_id
        ]
        # Operands precede their users.
        self.by_id = {each.id: each for each in self.entry.instructions}
        self.place = {id_: i for i, id_ in enumerate(self.by_id)}
        root = self.by_id[self.entry.root_id]
        is_tuple = root.shape.element_type == xla_data_pb2.TUPLE
        self.results = list(root.operand_ids) if is_tuple else [root.id]

    def sources(self, starts: Iterable[int], equal: set[int]) -> list[int]:
        """Returns what `starts` are computed from, in order, without themselves.

        The search stops at instructions of `equal`, and constants are left out.
        """
        seen: set[int] = set()
        waiting = [o for start in starts for o in self.by_id[start].operand_ids]
        while waiting:
            id_ = waiting.pop()
            if id_ not in seen and id_ not in equal:
                seen.add(id_)
                waiting += self.by_id[id_].operand_ids
        return [id_ for id_ in self.by_id if id_ in seen and self._observable(id_)]

    def operands(self, id_: int) -> list[int]:
        """Returns the nearest observable instructions that one is computed from."""
        operands = []
        for operand in self.by_id[id_].operand_ids:
            if self._observable(operand):
                operands.append(operand)
            elif self.by_id[operand].opcode not in _LEAVES:
                operands += self.operands(operand)
        return operands

    def _observable(self, id_: int) -> bool:
        instruction = self.by_id[id_]
        return (
            instruction.opcode not in _LEAVES
            and instruction.shape.element_type in _DTYPES
        )

    def inside(self, id_: int) -> str:
        """Returns the opcode of the loop or branch that an instruction comes from."""
        instruction = self.by_id[id_]
        while instruction.opcode == "get-tuple-element":
            instruction = self.by_id[instruction.operand_ids[0]]
        return instruction.opcode if instruction.opcode in _INNER else ""

    def bytes(self, id_: int) -> int:
        """Returns the size of an instruction's result."""
        shape = self.by_id[id_].shape
        return int(np.prod(shape.dimensions)) * _DTYPES[shape.element_type].size

    def with_results(
        self, step: lowering.LoweredStep, ids: Sequence[int]
    ) -> lowering.LoweredStep:
        """Returns the step with some instructions as additional outputs."""
        proto = HloModuleProto()
        proto.CopyFrom(self.proto)
        # Memory is not reused: the indices of the aliasing table no longer hold.
        proto.ClearField("input_output_alias")
        [entry] = [c for c in proto.computations if c.id == self.entry.id]
        root = entry.instructions.add()
        root.id = next_instruction_id(proto)
        root.name = f"observed.{root.id}"
        root.opcode = "tuple"
        root.shape.element_type = xla_data_pb2.TUPLE
        for id_ in [*self.results, *ids]:
            root.operand_ids.append(id_)
            shape = root.shape.tuple_shapes.add()
            shape.CopyFrom(self.by_id[id_].shape)
        entry.root_id = root.id
        entry.program_shape.result.CopyFrom(root.shape)
        proto.host_program_shape.result.CopyFrom(root.shape)
        specs = [
            tf.TensorSpec(tuple(shape.dimensions), _DTYPES[shape.element_type])
            for shape in (self.by_id[id_].shape for id_ in ids)
        ]
        results = [*step.results, *specs]
        return dataclasses.replace(
            step,
            hlo=proto.SerializeToString(),
            results=results,
            num_outputs=len(results),
            updates=[],
        )


def find_first(
    step: lowering.LoweredStep, differing: Sequence[int], compare: Compare
) -> FirstDifference | None:
    """Finds an instruction that differs while all its operands are equal.

    Args:
        step: The step.
        differing: The indices of its results that differ.
        compare: Runs a step on both sides.

    Returns:
        The instruction; None when nothing differs any more once intermediate values
        are results too, because the compiler then makes another program.
    """
    graph = EntryGraph(step.hlo)
    equal: set[int] = set()
    difference: FirstDifference | None = None
    starts = [graph.results[i] for i in differing]
    ends = [id_ for id_ in starts if graph.by_id[id_].opcode not in _LEAVES]
    candidates = sorted(
        {*graph.sources(starts, equal), *ends}, key=graph.place.__getitem__
    )
    near = ends[:_ENDS]
    for _ in range(_ROUNDS):
        chosen = _choose(candidates, [id_ for id_ in near if id_ in candidates], graph)
        if not chosen:
            break
        measures = compare(graph.with_results(step, chosen))[len(step.results) :]
        at = next((i for i, each in enumerate(measures) if not each.ok), None)
        equal.update(id_ for id_, each in zip(chosen, measures, strict=True) if each.ok)
        if at is not None:
            first = chosen[at]
            difference = FirstDifference(
                graph.by_id[first], measures[at], graph.inside(first), certain=False
            )
        elif difference is None:
            return None
        candidates = graph.sources([difference.instruction.id], equal)
        near = graph.operands(difference.instruction.id)
        if not set(near) - equal:
            return dataclasses.replace(difference, certain=True)
    return difference


def _choose(candidates: list[int], near: list[int], graph: EntryGraph) -> list[int]:
    """Returns candidates at equal distances, and all near ones, in order."""
    count = min(len(candidates), _OBSERVED)
    places = np.unique(np.linspace(0, len(candidates) - 1, count).astype(int))
    chosen: list[int] = []
    size = 0
    for id_ in dict.fromkeys([*near, *(candidates[i] for i in places)]):
        if size + graph.bytes(id_) <= _BYTES or not chosen:
            chosen.append(id_)
            size += graph.bytes(id_)
    return sorted(chosen, key=graph.place.__getitem__)
