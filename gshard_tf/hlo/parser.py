"""Reads the text of a compiled HLO module: what runs, and how often.

The text is the form that every version of jaxlib gives and that does not depend on the
protocol buffers of this TensorFlow.
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
_OP_NAME = re.compile(r'op_name="([^"]*)"')

# The `to_apply` of most is what combines two numbers, not a part of the program. What
# an asynchronous pair calls runs once, and its start names it.
_NOT_CALLING = frozenset(
    "all-reduce all-reduce-start map reduce reduce-scatter reduce-window scatter "
    "select-and-scatter sort async-update async-done".split()
)


@dataclasses.dataclass(frozen=True)
class Array:
    """One array of a shape."""

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
        arrays: What it results in, one array or those of a tuple.
        operands: The names of what it is applied to.
        attributes: The rest of its line.
        op_name: The TensorFlow operation that it stems from, or "".
        root: Whether its computation results in it.
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
        """Each instruction that runs, its computation, and how often it runs.

        One without a name of its own is given that of what it is applied to, or else
        its caller's: the compiler names little of what it makes itself.

        Of the branches of a conditional, all count. How often a loop turns is what
        the module says, or what follows from its constants; else what `loops` says,
        from `Module.loops` of the module that this one was compiled from. Where
        nobody knows, what is in the loop runs None times.
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
                name_ = _nearest_name(instruction, computation, 3) or caller
                instruction = dataclasses.replace(instruction, op_name=name_)
            yield instruction, computation, times
            if instruction.opcode in _NOT_CALLING:
                continue
            inner = times
            if instruction.opcode == "while":
                turns = _turns(instruction, frame, loops)
                inner = None if None in (turns, times) else times * turns
            for each, within in _frames(instruction, frame):
                yield from self._run(each, within, inner, instruction.op_name, loops)

    def loops(self) -> dict[str, int | None]:
        """How often each loop turns, by `op_name`; None where that is not known.

        Nor is it where loops of one name differ.
        """
        found: dict[str, set[int | None]] = {}
        entry = Frame(self.computations, self.entry)
        for name, turns in self._loops(self.entry, entry, {}):
            found.setdefault(name, set()).add(turns)
        return {
            name: turns.pop() if len(turns) == 1 else None
            for name, turns in found.items()
        }

    def unknown_loops(self, loops: Mapping[str, int | None] | None = None) -> list[str]:
        """The `op_name` of each loop of which nobody knows how often it turns.

        `loops` as for `executed`.
        """
        entry = Frame(self.computations, self.entry)
        found = self._loops(self.entry, entry, loops or {})
        return [name for name, turns in found if turns is None]

    def _loops(
        self, name: str, frame: Frame, loops: Mapping[str, int | None]
    ) -> Iterator[tuple[str, int | None]]:
        for instruction in self.computations[name].values():
            if instruction.opcode in _NOT_CALLING:
                continue
            if instruction.opcode == "while":
                yield instruction.op_name, _turns(instruction, frame, loops)
            for each, within in _frames(instruction, frame):
                yield from self._loops(each, within, loops)


def _frames(instruction: Instruction, frame: Frame) -> Iterator[tuple[str, Frame]]:
    """The computations that an instruction calls, and what they know."""
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


def _turns(
    loop: Instruction, frame: Frame, loops: Mapping[str, int | None]
) -> int | None:
    """How often a loop turns: as its module says, or else the one it is made of.

    Names are longer after compilation, by the calls around them.
    """
    turns = frame.turns(loop)
    if turns is None:
        name = f"/{loop.op_name}"
        known = [each for each in loops if each and name.endswith(f"/{each}")]
        turns = loops[max(known, key=len)] if known else None
    return turns


def _nearest_name(
    instruction: Instruction, computation: dict[str, Instruction], depth: int
) -> str:
    """The first `op_name` among an instruction and what it is applied to."""
    if instruction.op_name or not depth:
        return instruction.op_name
    for operand in instruction.operands:
        if operand in computation:
            found = _nearest_name(computation[operand], computation, depth - 1)
            if found:
                return found
    return ""


def called(instruction: Instruction) -> list[str]:
    """The names of the computations that an instruction calls or applies."""
    if "=" not in instruction.attributes:
        return []
    names = _CALLED.findall(instruction.attributes)
    for branches in _BRANCHES.findall(instruction.attributes):
        names += [name.strip().lstrip("%") for name in branches.split(",")]
    return names


def parse(text: str) -> Module:
    """The module that `compiled.as_text()` prints."""
    computations: dict[str, dict[str, Instruction]] = {}
    entry = ""
    current: dict[str, Instruction] = {}
    for line in text.splitlines():
        if not line.startswith(" "):
            head = _COMPUTATION.match(line)
            if head:
                current = computations.setdefault(head["name"], {})
                if head["entry"]:
                    entry = head["name"]
            continue
        found = _INSTRUCTION.match(line)
        if found is None:
            continue
        operands, _, attributes = found["rest"].partition(")")
        op_name = _OP_NAME.search(attributes)
        current[found["name"]] = Instruction(
            name=found["name"],
            opcode=found["opcode"],
            arrays=arrays(found["shape"]),
            operands=tuple(_OPERAND.findall(_COMMENT.sub("", operands))),
            attributes=attributes,
            op_name=op_name[1] if op_name else "",
            root=bool(found["root"]),
        )
    if not entry:
        raise ValueError(
            f"This is no text of an HLO module. Received: {text[:80]!r}..."
        )
    return Module(computations, entry)


@functools.lru_cache(maxsize=4096)
def arrays(shape: str) -> tuple[Array, ...]:
    """The arrays of a shape's text, `f32[2,8]{1,0}` or a tuple of such."""
    return tuple(
        Array(found["dtype"], tuple(int(d) for d in found["dims"].split(",") if d))
        for found in _ARRAY.finditer(_LAYOUT.sub("", shape))
    )


def dtype_bytes(dtype: str) -> int:
    """Bytes of one element: f32 -> 4, bf16 -> 2, s64 -> 8, f8e4m3fn -> 1, pred -> 1."""
    bits = re.search(r"\d+", dtype)
    if dtype == "pred":
        return 1
    return max(1, int(bits[0]) // 8) if bits else 0
