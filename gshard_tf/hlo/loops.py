"""How often the loops of an HLO module turn, where that follows from its constants.

A loop's condition looks at a few scalars of its state, counters and bounds, and its
body makes their next values of a few more. So only these are followed, turn by turn, as
the program itself would: whatever the condition compares, however the counters move.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gshard_tf.hlo.parser import Instruction

# Where in a nest of tuples a value stands; () is the value itself.
Path = tuple[int, ...]

#: Turns after which a loop counts as one that nobody knows.
LONGEST = 100_000

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
_BINARY = {
    "add": lambda a, b: a + b,
    "subtract": lambda a, b: a - b,
    "multiply": lambda a, b: a * b,
    "minimum": min,
    "maximum": max,
    # Only of what is true or false: see `Frame._scalar`.
    "and": lambda a, b: a & b,
    "or": lambda a, b: a | b,
}


@dataclasses.dataclass(frozen=True)
class Slot:
    """A value that the caller alone knows: that of its argument at `path`."""

    path: Path


class Frame:
    """One call of a computation, whose scalars are worked out when they are asked for.

    Args:
        computations: Those of the module, each a dict of its instructions by name.
        name: The computation that is called.
        argument: Its arguments: `argument(number, path)` -> an integer, or None where
            that is not known. None: nothing is known of them.
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
        """What the computation results in, if that is known."""
        root = next((i for i in self.instructions.values() if i.root), None)
        return None if root is None else self.value(root.name, path)

    def value(self, name: str, path: Path = ()) -> int | Slot | None:
        """An integer of the computation (1 for true), or None where it is not known."""
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
            index = int(re.search(r"index=(\d+)", instruction.attributes)[1])
            return self.value(operands[0], (index, *path))
        if opcode in _SAME or 'custom_call_target="Sharding"' in instruction.attributes:
            return self.value(operands[0], path)
        if opcode in ("call", "fusion"):
            called = re.search(
                r"(?:calls|to_apply)=%?([\w.\-]+)", instruction.attributes
            )
            return self.calls(instruction, called[1]).result(path)
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
        values = [self.value(operand) for operand in instruction.operands]
        if not values or not all(isinstance(value, int) for value in values):
            return None
        if opcode == "compare":
            direction = re.search(r"direction=(\w+)", instruction.attributes)[1]
            return int(_COMPARE[direction](*values))
        if opcode == "not":
            return 1 - values[0] if array.dtype == "pred" else None
        if opcode == "select":
            return values[1] if values[0] else values[2]
        known = _BINARY.get(opcode)
        return known(*values) if known else None

    def calls(self, instruction: "Instruction", name: str, first: int = 0) -> "Frame":
        """The frame of a computation that gets the operands of `instruction`.

        Args:
            instruction: What calls it.
            name: The computation.
            first: Which operand is its first: of a conditional, each branch has one.
        """
        return Frame(
            self.computations,
            name,
            lambda number, path: self.value(instruction.operands[number + first], path),
        )

    def body(self, loop: "Instruction") -> "Frame":
        """The frame of any turn of a loop: known is what no turn changes."""
        name = _part(loop, "body")
        turn = Frame(self.computations, name, lambda number, path: Slot(path))

        def argument(number: int, path: Path) -> int | Slot | None:
            if turn.result(path) == Slot(path):
                return self.value(loop.operands[0], path)
            return None

        return Frame(self.computations, name, argument)

    def turns(self, loop: "Instruction") -> int | None:
        """How often a loop turns, or None where that is not known."""
        known = _TRIPS.search(loop.attributes)
        if known:
            return int(known[1])
        return _run(self, loop, set())[0]


def _part(loop: "Instruction", which: str) -> str:
    return re.search(rf"{which}=%?([\w.\-]+)", loop.attributes)[1]


def _final(frame: Frame, loop: "Instruction", path: Path) -> int | Slot | None:
    """What stands at `path` of a loop's state when it ends."""
    turns, state = _run(frame, loop, {path})
    return None if turns is None else state.get(path)


def _run(
    frame: Frame, loop: "Instruction", wanted: set[Path]
) -> tuple[int | None, dict[Path, int | Slot | None]]:
    """Runs the counters of a loop.

    Returns:
        How often it turns, or None; and then the values at `wanted` and at all places
        of the state that they and the condition depend on.
    """
    state: dict[Path, int | Slot | None] = {}
    touched: list[Path] = []

    def argument(number: int, path: Path) -> int | Slot | None:
        if path not in state:
            state[path] = frame.value(loop.operands[0], path)
            touched.append(path)
        return state[path]

    condition, body = _part(loop, "condition"), _part(loop, "body")
    for path in wanted:
        argument(0, path)
    # All that the next values depend on, before the first turn changes any.
    Frame(frame.computations, condition, argument).result()
    first = Frame(frame.computations, body, argument)
    for path in touched:  # grows on the way
        first.result(path)
    places = len(state)
    for turn in range(LONGEST):
        goes_on = Frame(frame.computations, condition, argument).result()
        if not isinstance(goes_on, int):
            break
        if not goes_on:
            return turn, state
        after = Frame(frame.computations, body, argument)
        values = {path: after.result(path) for path in list(state)}
        if len(state) > places:  # it looks where the first turn did not
            break
        state.update(values)
    return None, {}
