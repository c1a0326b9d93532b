"""What a compiled program does, read off the program itself."""

import dataclasses
import math
import re

from gshard_tf.program import SpmdProgram

_KINDS = (
    "all-to-all",
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "collective-permute",
)
# %name = f32[2,8]{1,0} all-gather(...) or a tuple of shapes; a `-start` of an
# asynchronous pair counts, its `-done` does not.
_COLLECTIVE = re.compile(
    rf"%?(?P<name>[\w.\-]+) = (?P<shape>\([^)]*\)|\S+) "
    rf"(?P<kind>{'|'.join(_KINDS)})(?:-start)?\("
)
_ARRAY = re.compile(r"(?P<dtype>[a-z]+\d*\w*)\[(?P<dims>[\d,]*)\]")
_WORD_BITS = re.compile(r"\d+")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One communication step of a program.

    Attributes:
        kind: Such as `"all-to-all"`.
        shapes: The arrays that each device receives, `(dtype, dimensions)` each.
        bytes: Their size in bytes, per device.
        op_name: The operation that it stems from, if the program says.
    """

    kind: str
    shapes: tuple[tuple[str, tuple[int, ...]], ...]
    bytes: int
    op_name: str


def collectives(program: SpmdProgram) -> list[Collective]:
    """The communication of a compiled program, in program order."""
    return parse_collectives(program.compiled.as_text())


def parse_collectives(hlo_text: str) -> list[Collective]:
    """The same, from the text of an optimized HLO module."""
    found = []
    for line in hlo_text.splitlines():
        match = _COLLECTIVE.search(line)
        if match is None:
            continue
        shapes = tuple(
            (array["dtype"], tuple(int(d) for d in array["dims"].split(",") if d))
            for array in _ARRAY.finditer(re.sub(r"\{[^}]*\}", "", match["shape"]))
        )
        op_name = re.search(r'op_name="([^"]*)"', line)
        found.append(
            Collective(
                kind=match["kind"],
                shapes=shapes,
                bytes=sum(_bytes(dtype) * math.prod(dims) for dtype, dims in shapes),
                op_name=op_name[1] if op_name else "",
            )
        )
    return found


def _bytes(dtype: str) -> int:
    if dtype == "pred":
        return 1
    # f32 -> 4, bf16 -> 2, s64 -> 8, f8e4m3fn -> 1
    bits = _WORD_BITS.search(dtype)
    return max(1, int(bits[0]) // 8) if bits else 0


def argument_bytes(program: SpmdProgram) -> list[tuple[str, int, int]]:
    """For each variable of a program: its path, all its bytes, those per device.

    Read off the shardings that XLA compiled the program with, not off the layouts
    that were asked for.
    """
    shardings = program.compiled.input_shardings[0][len(program.step.inputs) :]
    found = []
    for value, sharding in zip(program.step.captures, shardings, strict=True):
        shape = tuple(value.shape)
        local = sharding.shard_shape(shape)
        size = value.dtype.size
        name = getattr(value, "path", "constant")
        found.append((name, math.prod(shape) * size, math.prod(local) * size))
    return found
