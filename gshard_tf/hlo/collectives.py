"""What a compiled program does, read off the program itself."""

import dataclasses
import math
import re
from collections.abc import Mapping

import numpy as np

from gshard_tf.compat.jax_hlo import hlo_as_text
from gshard_tf.hlo import parser
from gshard_tf.spmd.program import SpmdProgram

KINDS = (
    "all-to-all",
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "collective-permute",
)

# What the piece of an asynchronous collective that starts it is passed to, on a TPU.
_STARTS = 'custom_call_target="AsyncCollectiveStart"'


@dataclasses.dataclass(frozen=True)
class Collective:
    """One communication step of a program.

    Attributes:
        kind: Such as `"all-to-all"`.
        shapes: The arrays that each device receives, `(dtype, dimensions)` each.
        bytes: Their size in bytes, per device.
        op_name: The operation that it stems from, if the program says.
        times: How often it runs: more than once in a loop; None in a loop of which
            nobody knows how often it turns, because that depends on values.
        groups: The devices that communicate with each other, one row per group;
            None for a permutation.
        pairs: Of a permutation, `[number, 2]` sources and targets; else None.
        dimension: The dimension that an all-gather puts together, else None.
    """

    kind: str
    shapes: tuple[tuple[str, tuple[int, ...]], ...]
    bytes: int
    op_name: str
    times: int | None = 1
    groups: np.ndarray | None = dataclasses.field(default=None, compare=False)
    pairs: np.ndarray | None = dataclasses.field(default=None, compare=False)
    dimension: int | None = None


def collectives(program: SpmdProgram) -> list[Collective]:
    """The communication of a compiled program, in program order."""
    written = parser.parse(hlo_as_text(program.step.hlo))
    return collectives_of(parser.parse(program.compiled.as_text()), written.loops())


def collectives_of(
    module: parser.Module, loops: Mapping[str, int | None] | None = None
) -> list[Collective]:
    """The same, of a module that has been read; `loops`: see `Module.executed`."""
    found = []
    begun = _begun_in_pieces(module)
    fused = _fused(module)
    for instruction, computation, times in module.executed(loops):
        # Of an asynchronous pair the start counts, not the end.
        kind = instruction.opcode.removesuffix("-start")
        if kind not in KINDS:
            continue
        if _channel(instruction) in begun and not _begins(instruction, computation):
            continue
        arrays = instruction.arrays
        if kind == "all-reduce" and id(computation) in fused:
            parts = _scattered(instruction, computation)
            if parts:
                kind, arrays = "reduce-scatter", parts
        elif instruction.opcode != kind and len(arrays) > 1:
            # (operands, results, what else the pair needs)
            count = len(instruction.operands)
            arrays = arrays[count : 2 * count]
        dimension = re.search(r"dimensions=\{(\d+)\}", instruction.attributes)
        found.append(
            Collective(
                kind=kind,
                shapes=tuple((a.dtype, a.dims) for a in arrays),
                bytes=sum(a.bytes for a in arrays),
                op_name=instruction.op_name,
                times=times,
                groups=_groups(instruction.attributes),
                pairs=_pairs(instruction.attributes),
                dimension=int(dimension[1]) if dimension else None,
            )
        )
    return found


def _channel(instruction: parser.Instruction) -> str:
    channel = re.search(r"channel_id=(\d+)", instruction.attributes)
    return channel[1] if channel else ""


def _begins(
    instruction: parser.Instruction, computation: Mapping[str, parser.Instruction]
) -> bool:
    """Whether this is the piece of a collective that starts it."""
    return any(
        instruction.name in user.operands and _STARTS in user.attributes
        for user in computation.values()
    )


def _begun_in_pieces(module: parser.Module) -> set[str]:
    """The channels of collectives that the TPU compiler splits over fusions.

    It writes such a collective once into the fusion that starts it, where it says so,
    and again into each that computes while it goes on ("async collective fusion").
    """
    return {
        _channel(instruction)
        for computation in module.computations.values()
        for instruction in computation.values()
        if _channel(instruction) and _begins(instruction, computation)
    }


def _fused(module: parser.Module) -> set[int]:
    """The identities of the computations that are called by a fusion."""
    return {
        id(module.computations[called])
        for computation in module.computations.values()
        for instruction in computation.values()
        if instruction.opcode == "fusion"
        for called in parser.called(instruction)
    }


def _scattered(
    instruction: parser.Instruction, computation: Mapping[str, parser.Instruction]
) -> tuple[parser.Array, ...]:
    """The parts that are kept of a fused all-reduce, or () where some is kept whole.

    The TPU compiler has no other form of a reduce-scatter: an all-reduce of which each
    device slices its own part, in one fusion, which never makes the whole sum.
    """
    parts = []
    whole = [instruction.name]
    for name in whole:  # grows on the way
        users = [i for i in computation.values() if name in i.operands]
        for user in users:
            if user.opcode == "dynamic-slice":
                parts += user.arrays
            elif user.opcode in ("get-tuple-element", "bitcast"):
                whole.append(user.name)
            else:
                return ()
    return tuple(parts)


def _groups(attributes: str) -> np.ndarray | None:
    # {{0,1},{2,3}}, or [2,4]<=[8], or [4,2]<=[2,4]T(1,0), or mesh['a'=2,'b'=4] {'b'}
    axes = re.search(r"replica_groups=mesh\[([^\]]*)\] *\{([^}]*)\}", attributes)
    if axes:
        return _groups_of_axes(axes[1], axes[2])
    listed = re.search(r"replica_groups=\{(\{[\d,{} ]*\})\}", attributes)
    if listed:
        rows = re.findall(r"\{([\d, ]*)\}", listed[1])
        return np.array([[int(i) for i in row.split(",") if i] for row in rows])
    made = re.search(
        r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes
    )
    if made is None:
        return None
    shape, source = (tuple(map(int, made[i].split(","))) for i in (1, 2))
    devices = np.arange(math.prod(source)).reshape(source)
    if made[3]:
        devices = devices.transpose([int(d) for d in made[3].split(",")])
    return devices.reshape(shape)


def _groups_of_axes(mesh: str, axes: str) -> np.ndarray:
    """The groups along some axes of XLA's own mesh, or parts `'a':(2)4` of axes."""
    sizes = {name: int(n) for name, n in re.findall(r"'(\w+)'=(\d+)", mesh)}
    devices = np.arange(math.prod(sizes.values())).reshape(list(sizes.values()))
    names = list(sizes)
    chosen = []
    for name, before, size in re.findall(r"'(\w+)'(?::\((\d+)\)(\d+))?", axes):
        at = names.index(name)
        if size:  # the part of an axis with `before` in front of it
            parts = [int(before), int(size), -1]
            shape = devices.shape
            devices = devices.reshape([*shape[:at], *parts, *shape[at + 1 :]])
            names[at : at + 1] = [f"{name}:before", f"{name}:{before}", name]
            name = f"{name}:{before}"
        chosen.append(name)
    order = [i for i, name in enumerate(names) if name not in chosen]
    order += [names.index(name) for name in chosen]
    size = math.prod(devices.shape[names.index(name)] for name in chosen)
    return devices.transpose(order).reshape(-1, size)


def _pairs(attributes: str) -> np.ndarray | None:
    listed = re.search(r"source_target_pairs=\{(\{[\d,{} ]*\})\}", attributes)
    if listed is None:
        return None
    rows = re.findall(r"\{(\d+),(\d+)\}", listed[1])
    return np.array(rows, np.int64).reshape(-1, 2)


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
