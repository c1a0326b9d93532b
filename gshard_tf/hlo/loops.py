"""Trip counts of the loops of an HLO module, where they follow from its constants.

A loop's condition reads a few scalars of its state, counters and bounds, and its body
computes their next values from a few more. Only these are evaluated, iteration by
iteration, as the program itself would: whatever the condition compares, however the
counters move.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gshard_tf.hlo.parser import Instruction

# The place of a value in a nest of tuples; () is the value itself.
Path = tuple[int, ...]

#: Iterations after which the trip count of a loop counts as unknown.
MAX_ITERATIONS = 100_000

_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_INTEGER = re.compile(r"pred|[su]\d+")
_SAME = frozenset("bitcast convert copy opt-barrier reshape".split())
_COMPARE = {
    "EQ": lambda a, b: a == b,
    "NE": lambda a, b: a != b,
    "LT": lambda a, b: a < b,
    "LE": lambda a, b: a <= b,
    "GT": lambda a, b: a > b,
    "GE": lambda a, b: a >= b,
}
_BINARY: dict[str, Callable[[int, int], int]] = {
    "add": lambda a, b: a + b,
    "subtract": lambda a, b: a - b,
    "multiply": lambda a, b: a * b,
    "minimum": min,
    "maximum": max,
    # For truth values and integers alike.
    "and": lambda a, b: a & b,
    "or": lambda a, b: a | b,
}


@dataclasses.dataclass(frozen=True)
class Slot:
    """A value that only the caller knows: its argument at `path`."""

    path: Path


class Frame:
    """One call of a computation, whose scalars are evaluated on demand.

    Args:
        computations: The computations of the module, each a dict of its instructions
            by name.
        name: The computation that is called.
        argument: Its arguments: `argument(number, path)` returns an integer, or None
            where it is not known. None: none are known.
    """

    def __init__(
        self,
        computations: Mapping[str, Mapping[str, "Instruction"]],
        name: str,
        argument: Callable[[int, Path], int | Slot | None] | None = None,
    ):
        self.computations = computations
        self.instructions = computations[name]
        self.argument = argument or (lambda number, path: None)
        self._known: dict[tuple[str, Path], int | Slot | None] = {}

    def result(self, path: Path = ()) -> int | Slot | None:
        """Returns the result of the computation, or None where it is not known."""
        root = next((i for i in self.instructions.values() if i.root), None)
        return None if root is None else self.value(root.name, path)

    def value(self, name: str, path: Path = ()) -> int | Slot | None:
        """Returns an integer of the computation (1 for true), or None if not known."""
        key = (name, path)
        if key not in self._known:
            instruction = self.instructions.get(name)
            self._known[key] = None if instruction is None else self._of(*key)
        return self._known[key]

    def _of(self, name: str, path: Path) -> int | Slot | None:
        instruction = self.instructions[name]
        opcode, operands = instruction.opcode, instruction.operands
        if opcode == "parameter":
            return self.argument(int(operands[0]), path)
        if opcode == "tuple":
            return self.value(operands[path[0]], path[1:]) if path else None
        if opcode == "get-tuple-element":
            index = int(_attribute(r"index=(\d+)", instruction))
            return self.value(operands[0], (index, *path))
        if opcode in _SAME or 'custom_call_target="Sharding"' in instruction.attributes:
            return self.value(operands[0], path)
        if opcode in ("call", "fusion"):
            called = _attribute(r"(?:calls|to_apply)=%?([\w.\-]+)", instruction)
            return self.calls(instruction, called).result(path)
        if opcode == "while":
            return _final(self, instruction, path)
        return None if path else self._scalar(instruction)

    def _scalar(self, instruction: "Instruction") -> int | None:
        array = instruction.arrays[0] if instruction.arrays else None
        if array is None or array.dims or not _INTEGER.fullmatch(array.dtype):
            return None
        opcode = instruction.opcode
        if opcode == "constant":
            text = instruction.operands[0] if instruction.operands else ""
            if text in ("true", "false"):
                return int(text == "true")
            return int(text) if re.fullmatch(r"-?\d+", text) else None
        operands = [self.value(operand) for operand in instruction.operands]
        values = [value for value in operands if isinstance(value, int)]
        if not values or len(values) < len(operands):
            return None
        if opcode == "compare":
            direction = _attribute(r"direction=(\w+)", instruction)
            return int(_COMPARE[direction](*values))
        if opcode == "not":
            return 1 - values[0] if array.dtype == "pred" else None
        if opcode == "select":
            return values[1] if values[0] else values[2]
        function = _BINARY.get(opcode)
        return function(*values) if function else None

    def calls(self, instruction: "Instruction", name: str, first: int = 0) -> "Frame":
        """Returns the frame of a computation called with the operands of `instruction`.

        Args:
            instruction: The calling instruction.
            name: The computation.
            first: The operand that is its first: each branch of a conditional has one.
        """
        return Frame(
            self.computations,
            name,
            lambda number, path: self.value(instruction.operands[number + first], path),
        )

    def body(self, loop: "Instruction") -> "Frame":
        """Returns the frame of any iteration: known values are those none changes."""
        name = _computation_of(loop, "body")
        iteration = Frame(self.computations, name, lambda number, path: Slot(path))

        def argument(number: int, path: Path) -> int | Slot | None:
            if iteration.result(path) == Slot(path):
                return self.value(loop.operands[0], path)
            return None

        return Frame(self.computations, name, argument)

    def trip_count(self, loop: "Instruction") -> int | None:
        """Returns the number of iterations of a loop, or None if it is not known."""
        stated = _TRIPS.search(loop.attributes)
        if stated:
            return int(stated[1])
        return _run(self, loop, set())[0]


def _attribute(pattern: str, instruction: "Instruction") -> str:
    """Returns the group of a pattern that the attributes must contain."""
    match = re.search(pattern, instruction.attributes)
    if match is None:
        raise ValueError(
            f"{instruction.opcode} must have an attribute {pattern!r}. "
            f"Received: {instruction.attributes!r}"
        )
    return match[1]


def _computation_of(loop: "Instruction", role: str) -> str:
    return _attribute(rf"{role}=%?([\w.\-]+)", loop)


def _final(frame: Frame, loop: "Instruction", path: Path) -> int | Slot | None:
    """Returns the value at `path` of a loop's state when it ends."""
    trip_count, state = _run(frame, loop, {path})
    return None if trip_count is None else state.get(path)


def _run(
    frame: Frame, loop: "Instruction", paths: set[Path]
) -> tuple[int | None, dict[Path, int | Slot | None]]:
    """Runs the counters of a loop.

    Returns:
        The trip count, or None; and the final values at `paths` and at all places of
        the state that they and the condition depend on.
    """
    state: dict[Path, int | Slot | None] = {}
    accessed: list[Path] = []

    def argument(number: int, path: Path) -> int | Slot | None:
        if path not in state:
            state[path] = frame.value(loop.operands[0], path)
            accessed.append(path)
        return state[path]

    condition, body = (_computation_of(loop, r) for r in ("condition", "body"))
    for path in paths:
        argument(0, path)
    # Everything that the next values depend on, before the first iteration.
    Frame(frame.computations, condition, argument).result()
    first = Frame(frame.computations, body, argument)
    for path in accessed:  # grows on the way
        first.result(path)
    places = len(state)
    for iteration in range(MAX_ITERATIONS):
        continues = Frame(frame.computations, condition, argument).result()
        if not isinstance(continues, int):
            break
        if not continues:
            return iteration, state
        after = Frame(frame.computations, body, argument)
        values = {path: after.result(path) for path in list(state)}
        if len(state) > places:  # it reads what the first iteration did not
            break
        state.update(values)
    return None, {}
