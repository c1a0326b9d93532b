"""The communication of a compiled program, read off its HLO."""

import dataclasses
import math
import re
from collections.abc import Mapping

import numpy as np

from gshard_tf.hlo import parser

KINDS = (
    "all-to-all",
    "ragged-all-to-all",
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "collective-permute",
)

# On a TPU, the fusion that starts an asynchronous collective passes it to this call.
_ASYNC_START = 'custom_call_target="AsyncCollectiveStart"'


@dataclasses.dataclass(frozen=True)
class Collective:
    """One communication step of a program.

    Attributes:
        kind: Such as `"all-to-all"`.
        shapes: The arrays that each device receives, `(dtype, dimensions)` each.
        bytes: Their size in bytes, per device. Of a ragged all-to-all, whose sizes are
            values, that of the buffer: as much as it may receive.
        op_name: The operation that it stems from, or "".
        times: How often it runs: more than once in a loop; None in a loop whose number
            of iterations depends on values.
        groups: The devices that communicate with each other, one row per group;
            None for a permutation.
        pairs: `[number, 2]` sources and targets of a permutation; else None.
        dimension: The dimension that an all-gather concatenates; else None.
        origins: The operation that each of `shapes` stems from, or "": XLA combines
            small collectives. Empty where all stem from `op_name`.
    """

    kind: str
    shapes: tuple[tuple[str, tuple[int, ...]], ...]
    bytes: int
    op_name: str
    times: int | None = 1
    groups: np.ndarray | None = dataclasses.field(default=None, compare=False)
    pairs: np.ndarray | None = dataclasses.field(default=None, compare=False)
    dimension: int | None = None
    origins: tuple[str, ...] = ()

    @property
    def runs(self) -> int:
        """The number of runs that count: 1 where `times` is not known."""
        return 1 if self.times is None else self.times

    def parts(self) -> list["Collective"]:
        """Returns the collectives that this one combines: one for each origin."""
        if len(set(self.origins)) < 2:
            return [self]
        shapes: dict[str, list[tuple[str, tuple[int, ...]]]] = {}
        for shape, origin in zip(self.shapes, self.origins, strict=True):
            shapes.setdefault(origin, []).append(shape)
        return [
            dataclasses.replace(
                self,
                shapes=tuple(each),
                bytes=sum(parser.Array(*shape).bytes for shape in each),
                op_name=origin,
                origins=(),
            )
            for origin, each in shapes.items()
        ]


def collectives(
    module: parser.Module | str, loops: Mapping[str, int | None] | None = None
) -> list[Collective]:
    """Returns the communication of a compiled module, in program order.

    Args:
        module: The module, or its text as `compiled.as_text()` prints it.
        loops: How often its loops turn; see `Module.executed`.
    """
    if isinstance(module, str):
        module = parser.parse(module)
    communication = []
    async_channels = _async_fusion_channels(module)
    fused = _fused(module)
    for instruction, computation, times in module.executed(loops):
        # Of an asynchronous pair the start counts, not the end.
        kind = instruction.opcode.removesuffix("-start")
        if kind not in KINDS:
            continue
        if _channel(instruction) in async_channels and not _starts_async(
            instruction, computation
        ):
            continue
        arrays = instruction.arrays
        origins: tuple[str, ...] | None = None
        if kind == "all-reduce" and id(computation) in fused:
            shards = _reduce_scatter_shards(instruction, computation)
            if shards:
                kind = "reduce-scatter"
                arrays = tuple(shard.arrays[0] for shard in shards)
                origins = tuple(shard.op_name for shard in shards)
        elif instruction.opcode != kind != "all-reduce" and len(arrays) > 1:
            # (operands, results, what else the pair needs); of a sum, results alone.
            count = len(instruction.operands)
            arrays = arrays[count : 2 * count]
        if origins is None:
            origins = _origins(instruction, computation, len(arrays))
        if not any(origins):
            origins = ()
        dimension = re.search(r"dimensions=\{(\d+)\}", instruction.attributes)
        communication.append(
            Collective(
                kind=kind,
                shapes=tuple((a.dtype, a.dims) for a in arrays),
                bytes=sum(a.bytes for a in arrays),
                op_name=instruction.op_name,
                times=times,
                groups=_groups(instruction.attributes),
                pairs=_pairs(instruction.attributes),
                dimension=int(dimension[1]) if dimension else None,
                origins=origins,
            )
        )
    return communication


def _origins(
    instruction: parser.Instruction,
    computation: Mapping[str, parser.Instruction],
    number: int,
) -> tuple[str, ...]:
    """Returns the operation that each result of a collective stems from, or "".

    XLA combines collectives, and names the whole after one of them, or `(a:b:c)`. What
    takes a result from the tuple keeps its own name; else its operand has one.
    """
    # (The operands of an all-to-all of a tuple are pieces of one tensor.)
    if number < 2 or instruction.opcode.startswith("all-to-all"):
        return (instruction.op_name,) * number
    names = dict.fromkeys(range(number), "")
    results = {instruction.name}
    if instruction.opcode.endswith("-start"):
        results = {
            user.name
            for user in computation.values()
            if user.opcode.endswith("-done") and instruction.name in user.operands
        }
    for user in computation.values():
        if user.opcode == "get-tuple-element" and results & set(user.operands):
            index = re.search(r"index=(\d+)", user.attributes)
            if index and int(index[1]) in names:
                names[int(index[1])] = user.op_name
    for i, operand in enumerate(instruction.operands[:number]):
        if not names[i] and operand in computation:
            names[i] = computation[operand].op_name
    return tuple(names.values())


def _channel(instruction: parser.Instruction) -> str:
    channel = re.search(r"channel_id=(\d+)", instruction.attributes)
    return channel[1] if channel else ""


def _starts_async(
    instruction: parser.Instruction, computation: Mapping[str, parser.Instruction]
) -> bool:
    """Returns whether this instruction starts an asynchronous collective."""
    return any(
        instruction.name in user.operands and _ASYNC_START in user.attributes
        for user in computation.values()
    )


def _async_fusion_channels(module: parser.Module) -> set[str]:
    """Returns the channels of collectives that the TPU compiler splits over fusions.

    It writes such a collective once into the fusion that starts it, marked as such, and
    again into each fusion that computes meanwhile ("async collective fusion").
    """
    return {
        _channel(instruction)
        for computation in module.computations.values()
        for instruction in computation.values()
        if _channel(instruction) and _starts_async(instruction, computation)
    }


def _fused(module: parser.Module) -> set[int]:
    """Returns the identities of the computations that fusions call."""
    return {
        id(module.computations[called])
        for computation in module.computations.values()
        for instruction in computation.values()
        if instruction.opcode == "fusion"
        for called in parser.called(instruction)
    }


def _reduce_scatter_shards(
    instruction: parser.Instruction, computation: Mapping[str, parser.Instruction]
) -> tuple[parser.Instruction, ...]:
    """Returns what keeps a shard of a fused all-reduce; () if any result stays whole.

    The TPU compiler has no other form of a reduce-scatter: an all-reduce of which each
    device slices its own shard, in one fusion, which never makes the whole sum.
    """
    shards: list[parser.Instruction] = []
    whole = [instruction.name]
    for name in whole:  # grows on the way
        users = [i for i in computation.values() if name in i.operands]
        for user in users:
            if user.opcode == "dynamic-slice":
                shards.append(user)
            elif user.opcode in ("get-tuple-element", "bitcast"):
                whole.append(user.name)
            else:
                return ()
    return tuple(shards)


def _groups(attributes: str) -> np.ndarray | None:
    # {{0,1},{2,3}}, or [2,4]<=[8], or [4,2]<=[2,4]T(1,0), or mesh['a'=2,'b'=4] {'b'}
    axes = re.search(r"replica_groups=mesh\[([^\]]*)\] *\{([^}]*)\}", attributes)
    if axes:
        return _groups_of_axes(axes[1], axes[2])
    listed = re.search(r"replica_groups=\{(\{[\d,{} ]*\})\}", attributes)
    if listed:
        rows = re.findall(r"\{([\d, ]*)\}", listed[1])
        return np.array([[int(i) for i in row.split(",") if i] for row in rows])
    iota = re.search(
        r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes
    )
    if iota is None:
        return None
    shape, source = (tuple(map(int, iota[i].split(","))) for i in (1, 2))
    devices = np.arange(math.prod(source)).reshape(source)
    if iota[3]:
        devices = devices.transpose([int(d) for d in iota[3].split(",")])
    return devices.reshape(shape)


def _groups_of_axes(mesh: str, axes: str) -> np.ndarray:
    """Returns the groups along axes of XLA's own mesh, or sub-axes `'a':(2)4`."""
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
