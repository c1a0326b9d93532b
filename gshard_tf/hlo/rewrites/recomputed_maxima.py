"""Rewrite that computes a tensor and its maximum from one set of values.

TensorFlow's gradient of a maximum goes to the elements that equal it, by comparing all
of them with it. A compiler may compute these elements twice, once for the maximum and
once for the comparison, each in a loop of its own. If one loop rounds a product and the
other only the sum that follows, no element equals the maximum any more: its gradient is
lost, or 0 / 0. So a tensor that is compared with its own maximum is computed once.
"""

from gshard_tf.compat.xla_protos import (
    HloComputationProto,
    HloInstructionProto,
    HloModuleProto,
    ShapeProto,
    xla_data_pb2,
)
from gshard_tf.hlo.rewrites.editing import next_instruction_id

# An instruction's id, and a place in its nest of tuples.
Value = tuple[int, tuple[int, ...]]

_FLOATS = frozenset(
    (xla_data_pb2.F16, xla_data_pb2.BF16, xla_data_pb2.F32, xla_data_pb2.F64)
)
# Their result has the elements of their first operand, or some of them.
_MOVING = frozenset(
    "bitcast broadcast convert copy dynamic-slice gather reshape reverse slice "
    "transpose".split()
)
_STRUCTURE = frozenset(
    "call conditional get-tuple-element opt-barrier parameter tuple while".split()
)
_LEAVES = frozenset(["constant", "iota"])


class _ElementSets:
    """Disjoint sets of values that have the same elements."""

    def __init__(self):
        self._parent: dict[Value, Value] = {}

    def of(self, value: Value) -> Value:
        """Returns the representative of a value's set."""
        path = []
        while value in self._parent:
            path.append(value)
            value = self._parent[value]
        self._parent.update(dict.fromkeys(path, value))
        return value

    def join(self, one: Value, other: Value) -> None:
        """Merges the sets of two values."""
        one, other = self.of(one), self.of(other)
        if one != other:
            self._parent[one] = other


def compute_compared_maxima_once(module: HloModuleProto) -> bool:
    """Makes each tensor that is compared with its own extremum be computed once.

    Args:
        module: A lowered step. It is changed in place.

    Returns:
        Whether it was changed.
    """
    same = _element_sets(module)
    compared = _compared(module, same)
    if not compared:
        return False
    last = next_instruction_id(module) - 1
    changed = False
    for computation in module.computations:
        for instruction in list(computation.instructions):
            if (
                same.of((instruction.id, ())) in compared
                and instruction.opcode not in _MOVING | _STRUCTURE | _LEAVES
                and instruction.shape.element_type in _FLOATS
            ):
                last = _hold(computation, instruction, last)
                changed = True
    return changed


def _element_sets(module: HloModuleProto) -> _ElementSets:
    """Returns the values that have the same elements, through calls and tuples.

    A value that a loop changes counts as the same in all iterations.
    """
    same = _ElementSets()
    computations = {c.id: c for c in module.computations}

    def join(one: Value, other: Value, shape: ShapeProto) -> None:
        if shape.element_type != xla_data_pb2.TUPLE:
            same.join(one, other)
        for i, part in enumerate(shape.tuple_shapes):
            join((one[0], (*one[1], i)), (other[0], (*other[1], i)), part)

    for computation in module.computations:
        for each in computation.instructions:
            result, operands = (each.id, ()), [(id_, ()) for id_ in each.operand_ids]
            if each.opcode in _MOVING or each.opcode == "opt-barrier":
                join(result, operands[0], each.shape)
            elif each.opcode == "select":  # of segments: a maximum where there is one
                join(result, operands[1], each.shape)
            elif each.opcode == "tuple":
                for i, part in enumerate(each.shape.tuple_shapes):
                    join((each.id, (i,)), operands[i], part)
            elif each.opcode == "get-tuple-element":
                join(result, (operands[0][0], (each.tuple_index,)), each.shape)
            elif each.opcode in ("call", "conditional", "while"):
                for n, id_ in enumerate(each.called_computation_ids):
                    called = computations[id_]
                    if each.opcode == "conditional":
                        passed = [operands[n + 1]]
                    else:
                        passed = operands
                    for inner in called.instructions:
                        if inner.opcode == "parameter":
                            argument = passed[inner.parameter_number]
                            join((inner.id, ()), argument, inner.shape)
                    if each.opcode != "while" or n == 0:  # the body, not the condition
                        join(result, (called.root_id, ()), each.shape)
    return same


def _compared(module: HloModuleProto, same: _ElementSets) -> set[Value]:
    """Returns the sets of values that are compared with their own extremum."""
    computations = {c.id: c for c in module.computations}
    reduced: dict[Value, set[Value]] = {}
    for computation in module.computations:
        for each in computation.instructions:
            operand = _reduced(each, computations)
            if operand is not None:
                sources = reduced.setdefault(same.of((each.id, ())), set())
                sources.add(same.of((operand, ())))
    compared = set()
    for computation in module.computations:
        for each in computation.instructions:
            if each.opcode == "compare" and each.comparison_direction in ("EQ", "NE"):
                one, other = (same.of((id_, ())) for id_ in each.operand_ids)
                compared |= {one} & reduced.get(other, set())
                compared |= {other} & reduced.get(one, set())
    return compared


def _reduced(
    instruction: HloInstructionProto,
    computations: dict[int, HloComputationProto],
) -> int | None:
    """Returns the id of the operand of a maximum or minimum; None for others."""
    # The operands of a scatter: the array, the indices, the updates.
    place = {"reduce": 0, "reduce-window": 0, "scatter": 2}.get(instruction.opcode)
    if place is None or instruction.shape.element_type == xla_data_pb2.TUPLE:
        return None
    combine = computations[instruction.called_computation_ids[0]]
    if not any(i.opcode in ("maximum", "minimum") for i in combine.instructions):
        return None
    return instruction.operand_ids[place]


def _hold(
    computation: HloComputationProto,
    instruction: HloInstructionProto,
    last: int,
) -> int:
    """Puts a barrier between a tensor and its users; returns the last id in use."""
    place = next(
        i for i, x in enumerate(computation.instructions) if x.id == instruction.id
    )
    barrier = HloInstructionProto(
        name=f"kept.{last + 1}", id=last + 1, opcode="opt-barrier"
    )
    barrier.shape.CopyFrom(instruction.shape)
    barrier.metadata.CopyFrom(instruction.metadata)
    barrier.operand_ids.append(instruction.id)
    for user in computation.instructions:
        ids = [barrier.id if id_ == instruction.id else id_ for id_ in user.operand_ids]
        user.operand_ids[:] = ids
    if computation.root_id == instruction.id:
        computation.root_id = barrier.id
    rest = list(computation.instructions[place + 1 :])
    del computation.instructions[place + 1 :]
    computation.instructions.extend([barrier, *rest])
    return barrier.id
