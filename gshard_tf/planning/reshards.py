"""Which communication annotations ask for, and which one should know about."""

import collections
import dataclasses
import re
from collections.abc import Sequence

import numpy as np
from tensorflow.experimental import dtensor

from gshard_tf.hlo import layer_names, parser
from gshard_tf.hlo.collectives import Collective
from gshard_tf.planning.records import Communication, Reshard, Weight
from gshard_tf.sharding.rules import AxisRules

_SUMS = ("all-reduce", "reduce-scatter")


@dataclasses.dataclass(frozen=True)
class Annotation:
    """One annotation in a step: where it stands, how large and how split it is."""

    layer: str
    elements: int
    tiles: int


def annotations(
    module: parser.Module, layers: layer_names.LayerNames
) -> set[Annotation]:
    """The annotations of a step, from its module before it is partitioned."""
    found = set()
    for instruction, _, _ in module.executed():
        if 'custom_call_target="Sharding"' not in instruction.attributes:
            continue
        sharding = re.search(r"devices=\[([\d,]+)\]", instruction.attributes)
        tiles = 1
        if sharding:
            dims = [int(n) for n in sharding[1].split(",")]
            if "last_tile_dim_replicate" in instruction.attributes:
                dims = dims[:-1]
            tiles = int(np.prod(dims))
        found.add(
            Annotation(
                layers.layer_of(instruction.op_name),
                instruction.arrays[0].elements,
                tiles,
            )
        )
    return found


def axis_of(collective: Collective, mesh: dtensor.Mesh) -> str:
    """The mesh axes over which the devices of a collective communicate."""
    if collective.kind == "collective-permute":
        pairs = collective.pairs
    else:
        pairs = collective.groups
        if pairs is not None:
            pairs = np.stack([pairs[:, :1].repeat(pairs.shape[1], 1), pairs], -1)
            pairs = pairs.reshape(-1, 2)
    if pairs is None or not len(pairs):
        return "+".join(mesh.dim_names)
    places = np.stack(np.unravel_index(pairs, mesh.shape()), axis=-1)
    differs = np.any(places[:, 0] != places[:, 1], axis=0)
    return "+".join(name for name, d in zip(mesh.dim_names, differs, strict=True) if d)


class Judge:
    """Tells asked-for communication from the rest.

    Sums of partial results are what splitting a contracted dimension means. A change
    of layout is asked for if an annotation in the same layer (or one in it, or around
    it) is about a tensor of that size in as many parts; or if it gathers a weight that
    a rule stores split over more than its use does (`AxisRules.fsdp`).
    """

    def __init__(
        self,
        annotated: set[Annotation],
        weights: Sequence[Weight],
        mesh: dtensor.Mesh,
        rules: AxisRules,
    ):
        self.mesh, self.rules = mesh, rules
        self.annotated = annotated
        self.gathered = {
            int(np.prod(w.shape))
            for w in weights
            if w.rule.startswith(("fsdp", "zero"))
        }

    def asked(self, collective: Collective, layer: str) -> bool:
        if collective.kind in _SUMS:
            return True
        size = sum(int(np.prod(dims)) for _, dims in collective.shapes)
        if collective.kind == "all-gather" and size in self.gathered:
            return True
        # What a core receives is one part of the tensor that the annotation is about.
        # A gather leaves it in fewer parts than it was in.
        group = 1 if collective.groups is None else collective.groups.shape[-1]
        most = self.mesh.size
        if collective.kind == "all-gather":
            most //= group
        return any(
            a.elements == size * a.tiles and a.tiles <= most
            for a in self.annotated
            if _related(a.layer, layer)
        )

    def advice(self, collective: Collective, axis: str, operation: str) -> str:
        """What to write so that it does not happen."""
        logical = [
            name for name, mesh_axis in self.rules.rules.items() if mesh_axis in axis
        ]
        name = logical[0] if logical else axis
        where = f"the result of `{operation}`" if operation else "it"
        if collective.kind == "all-gather":
            rank = len(collective.shapes[0][1])
            axes = [
                repr(name) if d == collective.dimension else "None" for d in range(rank)
            ]
            return (
                f"Something is split over {axis!r} along dimension "
                f"{collective.dimension} and wanted whole. To keep it split, "
                f"annotate {where}: gshard_tf.annotate(x, ({', '.join(axes)})). If it "
                "must be whole, gshard_tf.replicate(x) says so."
            )
        return (
            f"Two layouts over {axis!r} meet. Annotate {where} by gshard_tf.annotate "
            "as what comes before or after it, so that only one is used; or, if the "
            "change is meant, on both sides of it."
        )


def _related(one: str, other: str) -> bool:
    """Whether one layer is the other, or in it."""
    return f"{one}/".startswith(f"{other}/") or f"{other}/".startswith(f"{one}/")


def summarise(
    found: Sequence[Collective],
    layers: layer_names.LayerNames,
    judge: Judge,
    seconds: Sequence[float],
) -> tuple[list[Communication], list[Reshard]]:
    """Collectives by kind, layer and axis; and the reshards that nobody asked for."""
    groups: dict[tuple, list[float]] = collections.defaultdict(lambda: [0, 0, 0.0])
    unasked: dict[tuple, list] = {}
    for collective, time in zip(found, seconds, strict=True):
        layer = layers.layer_of(collective.op_name)
        axis = axis_of(collective, judge.mesh)
        asked = judge.asked(collective, layer)
        total = groups[collective.kind, layer, axis, asked]
        total[0] += collective.times
        total[1] += collective.times * collective.bytes
        total[2] += collective.times * time
        if not asked:
            operation = layer_names.operation_of(collective.op_name)
            shape = " ".join(
                f"{dtype}[{','.join(map(str, dims))}]"
                for dtype, dims in collective.shapes[:1]
            )
            key = (collective.kind, layer, operation, shape, axis)
            entry = unasked.setdefault(
                key, [0, 0, judge.advice(collective, axis, operation)]
            )
            entry[0] += collective.times
            entry[1] += collective.times * collective.bytes
    communication = [
        Communication(kind, layer, axis, count, size, time, asked)
        for (kind, layer, axis, asked), (count, size, time) in groups.items()
    ]
    reshards = [
        Reshard(*key, count=count, bytes=size, advice=advice)
        for key, (count, size, advice) in unasked.items()
    ]
    return communication, sorted(reshards, key=lambda r: -r.bytes)
