"""Parses the text of an HLO module: its instructions, and how often each runs.

Every version of jaxlib prints this text, and it does not depend on the protocol buffers
of the installed TensorFlow.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Mapping

from gshard_tf.hlo.loops import Frame

# Modules before optimization have no % before names, and no arguments of computations.
_COMPUTATION = re.compile(r"^(?P<entry>ENTRY )?%?(?P<name>[\w.\-]+) (?:\(.*)?\{\s*$")
# %name = shape opcode(operands), attributes. A shape is one word, or a tuple.
_INSTRUCTION = re.compile(
    r"^\s+(?P<root>ROOT )?%?(?P<name>[\w.\-]+) = (?P<shape>\(.*?\)|\S+) "
    r"(?P<opcode>[a-z][\w\-]*)\((?P<rest>.*)$"
)
_ARRAY = re.compile(r"(?P<dtype>[a-z]+\d*\w*)\[(?P<dims>[\d,]*)\]")
_LAYOUT = re.compile(r"\{[^}]*\}")
_OPERAND = re.compile(r"%?([\w.\-]+)\s*(?:,|$)")
_COMMENT = re.compile(r"/\*.*?\*/")
_CALLED = re.compile(
    r"(?:calls|body|condition|to_apply|true_computation|false_computation)="
    r"%?([\w.\-]+)"
)
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
# A kernel's configuration may go on over several lines.
_CONTINUED = re.compile(r'\n(?=["}][^\n])')
_OP_NAME = re.compile(r'op_name="([^"]*)"')

# The `to_apply` of most combines two numbers and is not a part of the program. The
# computation of an asynchronous pair runs once, and the start names it.
_NOT_CALLING = frozenset(
    "all-reduce all-reduce-start map reduce reduce-scatter reduce-window scatter "
    "select-and-scatter sort async-update async-done".split()
)


@dataclasses.dataclass(frozen=True)
class Array:
    """Dtype and dimensions of one array of a shape."""

    dtype: str
    dims: tuple[int, ...]

    @property
    def elements(self) -> int:
        return math.prod(self.dims)

    @property
    def bytes(self) -> int:
        return self.elements * dtype_bytes(self.dtype)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a module.

    Attributes:
        name: Its own name.
        opcode: Such as `"dot"`.
        arrays: Its result, one array or those of a tuple.
        operands: The names of its operands.
        attributes: The rest of its line.
        op_name: The TensorFlow operation that it stems from, or "".
        root: Whether it is the result of its computation.
    """

    name: str
    opcode: str
    arrays: tuple[Array, ...]
    operands: tuple[str, ...]
    attributes: str
    op_name: str
    root: bool = False


@dataclasses.dataclass(frozen=True)
class Module:
    """The computations of a module by name, each a dict of its instructions."""

    computations: dict[str, dict[str, Instruction]]
    entry: str

    def executed(
        self, loops: Mapping[str, int | None] | None = None
    ) -> Iterator[tuple[Instruction, dict[str, Instruction], int | None]]:
        """Yields each instruction that runs, its computation, and how often it runs.

        An instruction without an `op_name` gets that of its operands, or else its
        caller's: the compiler names few instructions of its own.

        All branches of a conditional count. The trip count of a loop is what the
        module states, or what follows from its constants; else that of `loops`, from
        `Module.loops` of the module that this one was compiled from. If none is known,
        the instructions of the loop run None times.
        """
        yield from self._run(self.entry, Frame(self.computations, self.entry), 1, "",
                             loops or {})  # fmt: skip

    def _run(
        self,
        name: str,
        frame: Frame,
        times: int | None,
        caller: str,
        loops: Mapping[str, int | None],
    ) -> Iterator:
        computation = self.computations[name]
        for instruction in computation.values():
            if not instruction.op_name:
                op_name = _nearest_name(instruction, computation, 3) or caller
                instruction = dataclasses.replace(instruction, op_name=op_name)
            yield instruction, computation, times
            if instruction.opcode in _NOT_CALLING:
                continue
            inner = times
            if instruction.opcode == "while":
                trips = _trip_count(instruction, frame, loops)
                inner = None if trips is None or times is None else times * trips
            for each, within in _frames(instruction, frame):
                yield from self._run(each, within, inner, instruction.op_name, loops)

    def loops(self) -> dict[str, int | None]:
        """Returns the trip count of each loop by `op_name`; None if it is not known.

        Loops of one name with different trip counts have None.
        """
        counts: dict[str, set[int | None]] = {}
        entry = Frame(self.computations, self.entry)
        for name, trips in self._loops(self.entry, entry, {}):
            counts.setdefault(name, set()).add(trips)
        return {
            name: each.pop() if len(each) == 1 else None
            for name, each in counts.items()
        }

    def unknown_loops(self, loops: Mapping[str, int | None] | None = None) -> list[str]:
        """Returns the `op_name` of each loop whose trip count is not known.

        `loops` as for `executed`.
        """
        entry = Frame(self.computations, self.entry)
        counts = self._loops(self.entry, entry, loops or {})
        return [name for name, trips in counts if trips is None]

    def _loops(
        self, name: str, frame: Frame, loops: Mapping[str, int | None]
    ) -> Iterator[tuple[str, int | None]]:
        for instruction in self.computations[name].values():
            if instruction.opcode in _NOT_CALLING:
                continue
            if instruction.opcode == "while":
                yield instruction.op_name, _trip_count(instruction, frame, loops)
            for each, within in _frames(instruction, frame):
                yield from self._loops(each, within, loops)


def _frames(instruction: Instruction, frame: Frame) -> Iterator[tuple[str, Frame]]:
    """Yields the computations that an instruction calls, and their frames."""
    branch = 0
    for name in called(instruction):
        if name not in frame.computations:
            continue
        if instruction.opcode == "while":
            yield name, frame.body(instruction)
        elif instruction.opcode == "conditional":
            branch += 1
            yield name, frame.calls(instruction, name, branch)
        else:
            yield name, frame.calls(instruction, name)


def _trip_count(
    loop: Instruction, frame: Frame, loops: Mapping[str, int | None]
) -> int | None:
    """Returns the trip count of a loop by its module, or else by its origin.

    Names are longer after compilation, by the calls around them.
    """
    trips = frame.trip_count(loop)
    if trips is None:
        name = f"/{loop.op_name}"
        origins = [each for each in loops if each and name.endswith(f"/{each}")]
        trips = loops[max(origins, key=len)] if origins else None
    return trips


def _nearest_name(
    instruction: Instruction, computation: dict[str, Instruction], depth: int
) -> str:
    """Returns the first `op_name` among an instruction and its operands."""
    if instruction.op_name or not depth:
        return instruction.op_name
    for operand in instruction.operands:
        if operand in computation:
            op_name = _nearest_name(computation[operand], computation, depth - 1)
            if op_name:
                return op_name
    return ""


def called(instruction: Instruction) -> list[str]:
    """Returns the names of the computations that an instruction calls or applies."""
    if "=" not in instruction.attributes:
        return []
    names = _CALLED.findall(instruction.attributes)
    for branches in _BRANCHES.findall(instruction.attributes):
        names += [name.strip().lstrip("%") for name in branches.split(",")]
    return names


def parse(text: str) -> Module:
    """Parses the text of a module, as `compiled.as_text()` prints it."""
    computations: dict[str, dict[str, Instruction]] = {}
    entry = ""
    current: dict[str, Instruction] = {}
    for line in _CONTINUED.sub(" ", text).splitlines():
        if not line.startswith(" "):
            head = _COMPUTATION.match(line)
            if head:
                current = computations.setdefault(head["name"], {})
                if head["entry"]:
                    entry = head["name"]
            continue
        match = _INSTRUCTION.match(line)
        if match is None:
            continue
        operands, _, attributes = match["rest"].partition(")")
        op_name = _OP_NAME.search(attributes)
        current[match["name"]] = Instruction(
            name=match["name"],
            opcode=match["opcode"],
            arrays=arrays(match["shape"]),
            operands=tuple(_OPERAND.findall(_COMMENT.sub("", operands))),
            attributes=attributes,
            op_name=op_name[1] if op_name else "",
            root=bool(match["root"]),
        )
    if not entry:
        raise ValueError(
            f"`text` must be that of an HLO module. Received: {text[:80]!r}..."
        )
    return Module(computations, entry)


@functools.lru_cache(maxsize=4096)
def arrays(shape: str) -> tuple[Array, ...]:
    """Parses the text of a shape, `f32[2,8]{1,0}` or a tuple of such."""
    return tuple(
        Array(match["dtype"], tuple(int(d) for d in match["dims"].split(",") if d))
        for match in _ARRAY.finditer(_LAYOUT.sub("", shape))
    )


def dtype_bytes(dtype: str) -> int:
    """Returns bytes per element: f32 -> 4, bf16 -> 2, f8e4m3fn -> 1, pred -> 1."""
    bits = re.search(r"\d+", dtype)
    if dtype == "pred":
        return 1
    return max(1, int(bits[0]) // 8) if bits else 0
