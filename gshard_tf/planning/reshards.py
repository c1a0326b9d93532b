"""Separates communication that annotations imply from unintended resharding."""

import collections
import dataclasses
import re
from collections.abc import Sequence

import numpy as np
from tensorflow.experimental import dtensor

from gshard_tf.hlo import layer_names, parser
from gshard_tf.hlo.collectives import Collective
from gshard_tf.layouts.partition_spec import axes_of, join_axes
from gshard_tf.planning.records import Communication, Reshard, Weight
from gshard_tf.sharding.rules import AxisRules

_SUMS = ("all-reduce", "reduce-scatter")

# In the names that jax gives to the operations of `gshard_tf.manual`. (Where the layout
# changes at its border, no operation's name follows.)
_MANUAL = "/shard_map/"


@dataclasses.dataclass(frozen=True)
class Annotation:
    """One annotation in a step.

    Attributes:
        layer: The path of the layer that makes it.
        elements: The number of elements of the annotated tensor.
        shards: The number of shards that the tensor is split into.
    """

    layer: str
    elements: int
    shards: int


def annotations(
    module: parser.Module, layers: layer_names.LayerNames
) -> set[Annotation]:
    """Returns the annotations of a step, read from its module before partitioning."""
    annotated = set()
    for instruction, _, _ in module.executed():
        if 'custom_call_target="Sharding"' not in instruction.attributes:
            continue
        sharding = re.search(r"devices=\[([\d,]+)\]", instruction.attributes)
        shards = 1
        if sharding:
            dims = [int(n) for n in sharding[1].split(",")]
            if "last_tile_dim_replicate" in instruction.attributes:
                dims = dims[:-1]
            shards = int(np.prod(dims))
        annotated.add(
            Annotation(
                layers.layer_of(instruction.op_name),
                instruction.arrays[0].elements,
                shards,
            )
        )
    return annotated


def axis_of(collective: Collective, mesh: dtensor.Mesh) -> str:
    """Returns the mesh axes, joined by "+", over which a collective communicates."""
    if collective.kind == "collective-permute":
        pairs = collective.pairs
    else:
        pairs = collective.groups
        if pairs is not None:
            pairs = np.stack([pairs[:, :1].repeat(pairs.shape[1], 1), pairs], -1)
            pairs = pairs.reshape(-1, 2)
    if pairs is None or not len(pairs):
        return join_axes(mesh.dim_names) or ""
    coordinates = np.stack(np.unravel_index(pairs, mesh.shape()), axis=-1)
    differs = np.any(coordinates[:, 0] != coordinates[:, 1], axis=0)
    names = zip(mesh.dim_names, differs, strict=True)
    return join_axes(name for name, differ in names if differ) or ""


class ReshardClassifier:
    """Separates requested communication from the rest.

    A manual region requests its own. Sums of partial results are implied by splitting
    a contracted dimension. A change of layout is requested if an annotation in the same
    layer (or in a layer within it, or around it) concerns a tensor of that size in as
    many shards; or if it gathers a weight that a rule stores in more shards than its
    use has (`AxisRules.fsdp`).
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
        self.fsdp_sizes = {
            int(np.prod(w.shape))
            for w in weights
            if w.rule.startswith(("fsdp", "zero"))
        }

    def is_requested(self, collective: Collective, layer: str) -> bool:
        """Returns whether annotations, or a sum, imply a collective of a layer."""
        if collective.kind in _SUMS or _MANUAL in collective.op_name:
            return True
        size = sum(int(np.prod(dims)) for _, dims in collective.shapes)
        if collective.kind == "all-gather" and size in self.fsdp_sizes:
            return True
        # A core receives one shard of the annotated tensor. A gather leaves the tensor
        # in fewer shards than before.
        group = 1 if collective.groups is None else collective.groups.shape[-1]
        max_shards = self.mesh.size
        if collective.kind == "all-gather":
            max_shards //= group
        return any(
            a.elements == size * a.shards and a.shards <= max_shards
            for a in self.annotated
            if _related(a.layer, layer)
        )

    def advice(self, collective: Collective, axis: str, operation: str) -> str:
        """Returns which annotation would remove a collective.

        Args:
            collective: The collective.
            axis: Its mesh axes, from `axis_of`.
            operation: The operation that it stems from, or "".
        """
        logical = [
            name
            for name, mesh_axis in self.rules.rules.items()
            if set(axes_of(axis)) & set(axes_of(mesh_axis))
        ]
        name = logical[0] if logical else axis
        where = f"the result of `{operation}`" if operation else "it"
        if collective.kind == "all-gather":
            rank = len(collective.shapes[0][1])
            entries = tuple(
                name if d == collective.dimension else None for d in range(rank)
            )
            return (
                f"Something is split over {axis!r} along dimension "
                f"{collective.dimension} and wanted whole. To keep it split, "
                f"annotate {where}: gshard_tf.annotate(x, {entries}). If it must be "
                "whole, gshard_tf.replicate(x) says so."
            )
        return (
            f"Two layouts over {axis!r} meet. Annotate {where} by gshard_tf.annotate "
            "as what comes before or after it, so that only one is used; or, if the "
            "change is meant, on both sides of it."
        )


def _related(one: str, other: str) -> bool:
    """Returns whether one layer is the other, or within it."""
    return f"{one}/".startswith(f"{other}/") or f"{other}/".startswith(f"{one}/")


@dataclasses.dataclass
class _Total:
    """The sum over collectives that agree in some properties; see `Communication`."""

    count: int = 0
    shared: int = 0
    bytes: int = 0
    seconds: float = 0.0

    def add(self, part: Collective, seconds: float, counts: bool = True) -> None:
        """Adds a collective, or a part of one that counts elsewhere."""
        if counts:
            self.count += part.runs
        else:
            self.shared += part.runs
        self.bytes += part.runs * part.bytes
        self.seconds += part.runs * seconds


def summarize_communication(
    collectives: Sequence[Collective],
    layers: layer_names.LayerNames,
    classifier: ReshardClassifier,
    seconds: Sequence[float],
) -> tuple[list[Communication], list[Reshard]]:
    """Returns collectives by kind, layer and axis, and the unintended reshards.

    Args:
        collectives: The collectives of a step.
        layers: Finds the layers of the model in the names of operations.
        classifier: Decides which collectives are requested.
        seconds: The estimated time of one run of each collective.
    """
    totals: dict[tuple, _Total] = collections.defaultdict(_Total)
    unintended: dict[tuple, _Total] = collections.defaultdict(_Total)
    advice: dict[tuple, str] = {}
    for collective, time in zip(collectives, seconds, strict=True):
        axis = axis_of(collective, classifier.mesh)
        shares: dict[tuple, list[Collective]] = {}
        for part in collective.parts():
            layer = layers.layer_of(part.op_name)
            requested = classifier.is_requested(part, layer)
            shares.setdefault((part.kind, layer, axis, requested), []).append(part)
            if not requested:
                operation = layer_names.operation_of(part.op_name)
                shape = " ".join(
                    f"{dtype}[{','.join(map(str, dims))}]"
                    for dtype, dims in part.shapes[:1]
                )
                unasked = (part.kind, layer, operation, shape, axis)
                unintended[unasked].add(part, 0.0)
                if unasked not in advice:
                    advice[unasked] = classifier.advice(part, axis, operation)
        # It counts once, where most of its bytes are.
        largest = max(shares, key=lambda key: sum(part.bytes for part in shares[key]))
        for key, parts in shares.items():
            size = sum(part.bytes for part in parts)
            share = dataclasses.replace(collective, bytes=size)
            portion = size / collective.bytes if collective.bytes else 1.0
            totals[key].add(share, time * portion, key == largest)
    communication = [
        Communication(
            kind, layer, axis, t.count, t.bytes, t.seconds, requested, t.shared
        )
        for (kind, layer, axis, requested), t in totals.items()
    ]
    reshards = [
        Reshard(kind, layer, operation, shape, axis, t.count, t.bytes, advice[key])
        for key, t in unintended.items()
        for kind, layer, operation, shape, axis in [key]
    ]
    return communication, sorted(reshards, key=lambda r: -r.bytes)
