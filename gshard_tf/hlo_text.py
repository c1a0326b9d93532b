"""Reads the text of a compiled HLO module: what runs, and how often.

The text is the form that every version of jaxlib gives and that does not depend on the
protocol buffers of this TensorFlow.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Mapping

import numpy as np

# Modules before optimization have no % before names, and no arguments of computations.
_COMPUTATION = re.compile(r"^(?P<entry>ENTRY )?%?(?P<name>[\w.\-]+) (?:\(.*)?\{\s*$")
# %name = shape opcode(operands), attributes. A shape is one word, or a tuple.
_INSTRUCTION = re.compile(
    r"^\s+(?:ROOT )?%?(?P<name>[\w.\-]+) = (?P<shape>\(.*?\)|\S+) "
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
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_OP_NAME = re.compile(r'op_name="([^"]*)"')

# Their `to_apply` is what combines two numbers, not a part of the program.
_COMBINING = frozenset(
    "all-reduce all-reduce-start map reduce reduce-scatter reduce-window scatter "
    "select-and-scatter sort".split()
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
    """

    name: str
    opcode: str
    arrays: tuple[Array, ...]
    operands: tuple[str, ...]
    attributes: str
    op_name: str


@dataclasses.dataclass(frozen=True)
class Module:
    """The computations of a module by name, each a dict of its instructions."""

    computations: dict[str, dict[str, Instruction]]
    entry: str

    def executed(
        self, loops: Mapping[str, int] | None = None
    ) -> Iterator[tuple[Instruction, dict[str, Instruction], int]]:
        """Each instruction that runs, its computation, and how often it runs.

        One without a name of its own is given that of what it is applied to, or else
        its caller's: the compiler names little of what it makes itself.

        Of the branches of a conditional, all count. A loop counts as often as the
        module says that it turns, or as `loops` says, from `Module.loops` of the
        module that this one was compiled from; else once.
        """
        yield from self._run(self.entry, 1, loops or {}, "")

    def _run(
        self, name: str, times: int, loops: Mapping[str, int], caller: str
    ) -> Iterator:
        computation = self.computations[name]
        for instruction in computation.values():
            if not instruction.op_name:
                name_ = _nearest_name(instruction, computation, 3) or caller
                instruction = dataclasses.replace(instruction, op_name=name_)
            yield instruction, computation, times
            if instruction.opcode in _COMBINING:
                continue
            inner = times
            if instruction.opcode == "while":
                inner *= self._trips(instruction) or _trips_of(instruction, loops)
            for called in _called(instruction):
                if called in self.computations:
                    yield from self._run(called, inner, loops, instruction.op_name)

    def loops(self) -> dict[str, int]:
        """How often each loop turns, by `op_name`, where the module says so."""
        found = {}
        for computation in self.computations.values():
            for instruction in computation.values():
                if instruction.opcode == "while":
                    count = self._trips(instruction)
                    if count:
                        found[instruction.op_name] = count
        return found

    def _trips(self, instruction: Instruction) -> int:
        """How often a loop turns; 0 where the module does not say."""
        known = _TRIPS.search(instruction.attributes)
        if known:
            return int(known[1])
        # TensorFlow counts from 0 while the counter is below a constant.
        condition = re.search(r"condition=%?([\w.\-]+)", instruction.attributes)
        return min(self._bounds(condition[1]), default=0) if condition else 0

    def _bounds(self, name: str) -> Iterator[int]:
        """The constants that a condition compares with, by "less than"."""
        computation = self.computations.get(name, {})
        for each in computation.values():
            if each.opcode == "call":
                for called in _called(each):
                    yield from self._bounds(called)
            if each.opcode != "compare" or "direction=LT" not in each.attributes:
                continue
            bound = computation.get(each.operands[-1])
            if bound is not None and bound.opcode == "constant":
                if bound.operands[0].isdigit():
                    yield int(bound.operands[0])


def _trips_of(instruction: Instruction, loops: Mapping[str, int]) -> int:
    """How often a loop turns, as known of the module before it was compiled.

    Names are longer afterwards. The loop of a gradient is called after the loop that
    it is the gradient of, and turns as often.
    """
    name = instruction.op_name.removesuffix("_grad")
    return next((n for known, n in loops.items() if name.endswith(known)), 1)


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


def _called(instruction: Instruction) -> list[str]:
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


# -- products ------------------------------------------------------------------------


def product_flops(instruction: Instruction, computation: dict[str, Instruction]) -> int:
    """FLOPs of a dot or a convolution, two per multiplication; 0 for all else.

    The TPU compiler turns dots into convolutions, with batch dimensions as spatial
    ones that are mostly padding; only positions inside the operands count.
    """
    if instruction.opcode == "dot":
        left = computation[instruction.operands[0]].arrays[0].dims
        depth = math.prod(
            left[d] for d in _dims(instruction.attributes, "lhs_contracting_dims")
        )
        return 2 * instruction.arrays[0].elements * depth
    if instruction.opcode == "convolution":
        left, right = (computation[name].arrays[0] for name in instruction.operands[:2])
        return _convolution_flops(
            left.dims, right.dims, instruction.arrays[0].dims, instruction.attributes
        )
    return 0


def _dims(attributes: str, name: str) -> list[int]:
    found = re.search(rf"{name}=\{{([\d,]*)\}}", attributes)
    return [int(d) for d in found[1].split(",") if d] if found else []


def _convolution_flops(
    left: tuple[int, ...], right: tuple[int, ...], out: tuple[int, ...], attributes: str
) -> int:
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", attributes)
    of_left, of_right, of_out = labels[1], labels[2], labels[3]
    window = re.search(r"window=\{([^}]*)\}", attributes)
    fields = dict(f.split("=", 1) for f in window[1].split()) if window else {}
    batch_groups = re.search(r"batch_group_count=(\d+)", attributes)
    flops = 2 * right[of_right.index("i")] * out[of_out.index("f")]
    flops *= left[of_left.index("b")] // (int(batch_groups[1]) if batch_groups else 1)
    for d in range(len(right) - 2):
        low = fields["pad"].split("x")[d].split("_")[0] if "pad" in fields else "0"
        numbers = [
            int(fields[name].split("x")[d]) if name in fields else 1
            for name in ("stride", "lhs_dilate", "rhs_dilate")
        ]
        flops *= _valid_positions(
            left[of_left.index(str(d))],
            right[of_right.index(str(d))],
            out[of_out.index(str(d))],
            int(low),
            *numbers,
        )
    return flops


@functools.lru_cache(maxsize=4096)
def _valid_positions(
    left: int, right: int, out: int, low: int, stride: int, dilate: int, spread: int
) -> int:
    """How many pairs (output, kernel position) meet an element of the operand."""
    total = 0
    kernel = np.arange(right) * spread
    for position in range(out):
        at = position * stride - low + kernel
        inside = (at >= 0) & (at % dilate == 0) & (at // dilate < left)
        total += int(np.count_nonzero(inside))
    return total
