"""Where a difference begins: a step's module, made to give what is in between.

The results of a module say that something differs; which instruction did it is found by
making some of them results too, on both sides, and going from one that differs to what
it is computed from, until all of that is equal.
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
from gshard_tf.spmd import lowering
from gshard_tf.verification.measures import Measure

# How many results in between one compilation gives, and how many bytes they may have.
_OBSERVED = 48
_BYTES = 1 << 30
_ROUNDS = 8
# How many of the results that differ are looked at first.
_ENDS = 8

_GIVEN = ("parameter", "constant", "iota", "partition-id")
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

# Runs a step on both sides and compares its results, those in between included.
Compare = Callable[[lowering.LoweredStep], list[Measure]]


@dataclasses.dataclass(frozen=True)
class FirstDifference:
    """The first instruction that differs.

    Attributes:
        instruction: It, as HLO has it.
        measure: By how much.
        inside: The opcode of the loop or branch that it is a result of, or "".
        certain: Whether all that it is computed from was found to be equal.
    """

    instruction: HloInstructionProto
    measure: Measure
    inside: str
    certain: bool


class EntryGraph:
    """The instructions of a module's entry computation.

    Args:
        hlo: A serialised `HloModuleProto`.
    """

    def __init__(self, hlo: bytes):
        self.proto = HloModuleProto.FromString(hlo)
        [self.entry] = [
            computation
            for computation in self.proto.computations
            if computation.id == self.proto.entry_computation_id
        ]
        # Operands come before what uses them.
        self.by_id = {each.id: each for each in self.entry.instructions}
        self.place = {id_: i for i, id_ in enumerate(self.by_id)}
        root = self.by_id[self.entry.root_id]
        is_tuple = root.shape.element_type == xla_data_pb2.TUPLE
        self.results = list(root.operand_ids) if is_tuple else [root.id]

    def sources(self, starts: Iterable[int], equal: set[int]) -> list[int]:
        """What `starts` are computed from, in order, themselves excluded.

        Nothing that can be observed lies behind one of `equal`, or is a constant.
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
        """The nearest observable instructions that one is computed from."""
        found = []
        for operand in self.by_id[id_].operand_ids:
            if self._observable(operand):
                found.append(operand)
            elif self.by_id[operand].opcode not in _GIVEN:
                found += self.operands(operand)
        return found

    def _observable(self, id_: int) -> bool:
        instruction = self.by_id[id_]
        return (
            instruction.opcode not in _GIVEN
            and instruction.shape.element_type in _DTYPES
        )

    def inside(self, id_: int) -> str:
        """The opcode of the loop or branch that an instruction is a result of."""
        instruction = self.by_id[id_]
        while instruction.opcode == "get-tuple-element":
            instruction = self.by_id[instruction.operand_ids[0]]
        return instruction.opcode if instruction.opcode in _INNER else ""

    def bytes(self, id_: int) -> int:
        shape = self.by_id[id_].shape
        return int(np.prod(shape.dimensions)) * _DTYPES[shape.element_type].size

    def with_results(
        self, step: lowering.LoweredStep, ids: Sequence[int]
    ) -> lowering.LoweredStep:
        """The step with some instructions as results after its own, all outputs."""
        proto = HloModuleProto()
        proto.CopyFrom(self.proto)
        # Memory is not reused; places in the aliasing table would be others.
        proto.ClearField("input_output_alias")
        [entry] = [c for c in proto.computations if c.id == self.entry.id]
        root = entry.instructions.add()
        root.id = 1 + max(i.id for c in proto.computations for i in c.instructions)
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
    """Finds an instruction that differs while all that it is computed from is equal.

    Args:
        step: The step.
        differing: Which of its results differ.
        compare: Runs a step on both sides.

    Returns:
        The instruction; None when nothing differs any more as soon as something in
        between is a result too: the compiler makes another program then.
    """
    graph = EntryGraph(step.hlo)
    equal: set[int] = set()
    found: FirstDifference | None = None
    starts = [graph.results[i] for i in differing]
    ends = [id_ for id_ in starts if graph.by_id[id_].opcode not in _GIVEN]
    candidates = sorted({*graph.sources(starts, equal), *ends}, key=graph.place.get)
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
            found = FirstDifference(
                graph.by_id[first], measures[at], graph.inside(first), certain=False
            )
        elif found is None:
            return None
        candidates = graph.sources([found.instruction.id], equal)
        near = graph.operands(found.instruction.id)
        if not set(near) - equal:
            return dataclasses.replace(found, certain=True)
    return found


def _choose(candidates: list[int], near: list[int], graph: EntryGraph) -> list[int]:
    """Some candidates at equal distances, and all that are near, in order."""
    count = min(len(candidates), _OBSERVED)
    places = np.unique(np.linspace(0, len(candidates) - 1, count).astype(int))
    chosen, size = [], 0
    for id_ in dict.fromkeys([*near, *(candidates[i] for i in places)]):
        if size + graph.bytes(id_) <= _BYTES or not chosen:
            chosen.append(id_)
            size += graph.bytes(id_)
    return sorted(chosen, key=graph.place.get)
