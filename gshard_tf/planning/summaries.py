"""Summaries of a plan for the table and the page: groups, segments, totals."""

from __future__ import annotations

import dataclasses
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from gshard_tf.layouts.partition_spec import axes_of
from gshard_tf.planning import units
from gshard_tf.planning.records import Communication, Weight

if TYPE_CHECKING:
    from gshard_tf.planning.plan import Plan

Item = TypeVar("Item")

_NUMBER = re.compile(r"_?\d+(?=_|/|$)")

ROLES = ("weight", "frozen", "optimizer", "other")
ROLE_NAMES = {
    "weight": "weights",
    "frozen": "frozen weights",
    "optimizer": "optimizer",
    "other": "metrics, seeds",
}


@dataclasses.dataclass(frozen=True)
class SimilarGroup:
    """Items whose names differ in numbers only; its name has `*` for each."""

    name: str
    items: list[Any]


def group_similar(
    items: Iterable[Item],
    name: Callable[[Item], str],
    key: Callable[[Item], Any] = lambda item: None,
) -> list[SimilarGroup]:
    """Groups items by name without numbers (and by `key`), in order of appearance."""
    groups: dict[Any, list[Item]] = {}
    for item in items:
        group = (_NUMBER.sub("", name(item)), key(item))
        groups.setdefault(group, []).append(item)
    return [
        SimilarGroup(_pattern([name(item) for item in members]), members)
        for members in groups.values()
    ]


def _pattern(names: Sequence[str]) -> str:
    """Returns the common pattern of names: `a_1/b` and `a_2/b` -> `a_*/b`."""
    parts = [name.split("/") for name in names]
    return "/".join(_part(column) for column in zip(*parts, strict=True))


def _part(column: Sequence[str]) -> str:
    if len(set(column)) == 1:
        return column[0]
    head = os.path.commonprefix(column)
    tails = [part[len(head) :][::-1] for part in column]
    tail = os.path.commonprefix(tails)[::-1]
    # A number is replaced as a whole: `encoder_1` and `encoder_10` share a digit.
    return f"{re.sub('[0-9]+$', '', head)}*{re.sub('^[0-9]+', '', tail)}"


@dataclasses.dataclass(frozen=True)
class Segment:
    """A part of the memory of a core."""

    key: str
    label: str
    bytes: float


def memory_segments(plan: Plan) -> list[Segment]:
    """Returns the segments of the memory of a core, whether the plan fits or not.

    The variables are known one by one; the rest of the arguments is the batch and the
    compiler's padding. Of a program that does not fit, only the sum is known, so
    everything else is one segment.
    """
    state = {
        role: plan.state_bytes(role, per_core=True)
        for role in ROLES
        if plan.state_bytes(role)
    }
    segments = [Segment(role, ROLE_NAMES[role], n) for role, n in state.items()]
    known = sum(state.values())
    if plan.memory is None:
        rest = plan.out_of_memory.needed - known if plan.out_of_memory else 0
        if rest > 0:
            segments.append(Segment("temporary", "all else the step needs", rest))
        return segments
    batch = plan.memory.arguments - known
    if batch >= 0:
        segments.append(Segment("batch", "batch, padding", batch))
    else:
        # The step does not use all variables, so the sum cannot be divided by role.
        segments = [Segment("weight", "variables and batch", plan.memory.arguments)]
    segments += [
        Segment("temporary", "temporaries", plan.memory.temporaries),
        Segment("output", "outputs", plan.memory.outputs),
        Segment("code", "code", plan.memory.code),
    ]
    return segments


def replicas(plan: Plan, weight: Weight) -> int:
    """Returns how many cores hold the same shard of a weight."""
    split = math.prod(
        plan.mesh.get(name, 1) for axis in weight.layout for name in axes_of(axis)
    )
    return plan.num_devices // split


def names_by_axis(plan: Plan) -> dict[str | None, list[str]]:
    """Returns what each mesh axis splits: logical axes, and `fsdp` or `zero`.

    Those that are not split are under None.
    """
    by_axis: dict[str | None, list[str]] = {}
    for logical, axis in plan.rules.items():
        by_axis.setdefault(axis, []).append(logical)
    stored = (re.match(r"(fsdp|zero) over '(\w+)'", w.rule) for w in plan.weights)
    for kind, axis in sorted({(m[1], m[2]) for m in stored if m}):
        by_axis.setdefault(axis, []).append(kind)
    return by_axis


def rules_by_axis(plan: Plan) -> str:
    """Returns rules as `batch, group, expert -> expert; embed -> (whole)`."""
    return "; ".join(
        f"{', '.join(names)} -> {axis or '(whole)'}"
        for axis, names in names_by_axis(plan).items()
    )


@dataclasses.dataclass
class LayerTotal:
    """The collectives of a group of similar layers, or of one layer."""

    layer: str
    layers: int
    parts: list[Communication]

    @property
    def number(self) -> str:
        """`3+1`: three, and a part of one that counts in another layer."""
        shared = sum(part.shared for part in self.parts)
        number = units.number(sum(part.count for part in self.parts))
        return f"{number}+{units.number(shared)}" if shared else number

    @property
    def bytes(self) -> int:
        return sum(part.bytes for part in self.parts)

    @property
    def seconds(self) -> float:
        return sum(part.seconds for part in self.parts)


def by_layer(communication: Sequence[Communication]) -> list[LayerTotal]:
    """Returns collectives by layer, similar layers together; the most bytes first."""
    totals = [
        LayerTotal(group.name, len({part.layer for part in group.items}), group.items)
        for group in group_similar(communication, lambda part: part.layer)
    ]
    return sorted(totals, key=lambda total: -total.bytes)


def by_kind(communication: Sequence[Communication]) -> list[Communication]:
    """Returns collectives of all layers by kind, axis and whether they are implied."""
    groups: dict[tuple, list[Communication]] = {}
    for part in communication:
        groups.setdefault((part.kind, part.axis, part.asked), []).append(part)
    return sorted(
        (
            Communication(
                kind=kind,
                layer="",
                axis=axis,
                count=sum(part.count for part in parts),
                bytes=sum(part.bytes for part in parts),
                seconds=sum(part.seconds for part in parts),
                asked=asked,
                shared=sum(part.shared for part in parts),
            )
            for (kind, axis, asked), parts in groups.items()
        ),
        key=lambda part: -part.bytes,
    )


def compiler(for_tpu: bool, versions: Mapping[str, str]) -> str:
    """Returns the name and version of the package whose compiler a plan is of."""
    package = "libtpu" if for_tpu else "jaxlib"
    return f"{package} {versions.get(package, '(unknown)')}"
