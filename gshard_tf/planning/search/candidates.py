"""Candidates of a search: every mesh of a slice, with every set of rules for it."""

import dataclasses
import itertools
from collections.abc import Collection, Iterator, Mapping, Sequence

from gshard_tf.sharding.rules import AxisRules

Paths = Sequence[tuple[str, Sequence[str | None]]]


@dataclasses.dataclass(frozen=True)
class MeshAxis:
    """An axis that a mesh may have, and what may be split over it.

    Attributes:
        name: Its name in the mesh.
        together: Logical axes that it always splits, if the model uses them. Of a model
            that uses none of them, it splits nothing.
        each: Logical axes that it may split or not.
        stores: Whether `fsdp` and `zero` may store weights and slots over it.
    """

    name: str
    together: tuple[str, ...] = ()
    each: tuple[str, ...] = ()
    stores: bool = False


#: The axes of the meshes that are tried, outermost first. One whose logical axes a
#: model does not use is not tried, so that a new kind of split is a new line here.
AXES = (
    # Stages send least, once in a tick.
    MeshAxis("stage", together=("stage",), each=("vocab",)),
    MeshAxis("data", together=("batch", "group"), each=("expert",), stores=True),
    MeshAxis("rows", together=("height",)),
    MeshAxis("columns", together=("width",)),
    MeshAxis("seq", together=("length",)),
    MeshAxis("model", each=("mlp", "heads", "vocab", "expert")),
)

#: Logical axes that count examples or positions: weights' gradients are summed over
#: the mesh axes that split them.
TOKENS = frozenset({"batch", "group", "length", "height", "width"})


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A mesh and its rules.

    Attributes:
        mesh: Axes and sizes, outermost first.
        rules: Logical axis -> mesh axis.
        fsdp: As in `AxisRules`.
        zero: As in `AxisRules`.
    """

    mesh: Mapping[str, int]
    rules: Mapping[str, str]
    fsdp: str | None = None
    zero: str | None = None

    def axis_rules(self, paths: Paths = ()) -> AxisRules:
        """Returns the rules, new ones at each call: they record what used them."""
        return AxisRules(self.rules, paths, fsdp=self.fsdp, zero=self.zero)

    def token_axes(self) -> list[str]:
        """Returns the mesh axes that split examples or positions, in mesh order."""
        over = {axis for logical, axis in self.rules.items() if logical in TOKENS}
        return [axis for axis in self.mesh if axis in over]

    def stage_axes(self) -> list[str]:
        """Returns the mesh axis of the stages of a pipeline, if there is one."""
        return [axis for name, axis in self.rules.items() if name == "stage"]

    def splits(self, axes: Collection[str]) -> int:
        """Returns the product of the sizes of some mesh axes."""
        count = 1
        for axis in axes:
            count *= self.mesh[axis]
        return count

    def python(self, paths: Paths = ()) -> str:
        """Returns the Python text that makes this mesh, its rules and a strategy."""
        lines = ["import gshard_tf", ""]
        sizes = ", ".join(f'"{axis}": {size}' for axis, size in self.mesh.items())
        lines += [f"mesh = gshard_tf.create_mesh({{{sizes}}})"]
        lines += ["rules = gshard_tf.AxisRules(", "    {"]
        lines += [f'        "{name}": "{axis}",' for name, axis in self.rules.items()]
        lines += ["    },"]
        if paths:
            lines += ["    paths=["]
            lines += [f"        ({p!r}, {tuple(axes)!r})," for p, axes in paths]
            lines += ["    ],"]
        lines += [
            f'    {name}="{axis}",'
            for name, axis in (("fsdp", self.fsdp), ("zero", self.zero))
            if axis is not None
        ]
        lines += [")", "strategy = gshard_tf.SpmdStrategy(mesh, rules)"]
        return "\n".join(lines)

    def __str__(self) -> str:
        mesh = ",".join(f"{axis}={size}" for axis, size in self.mesh.items())
        by_axis: dict[str, list[str]] = {}
        for logical, axis in self.rules.items():
            by_axis.setdefault(axis, []).append(logical)
        rules = "; ".join(f"{'+'.join(n)}>{axis}" for axis, n in by_axis.items())
        more = "".join(
            f"; {name}={axis}"
            for name, axis in (("fsdp", self.fsdp), ("zero", self.zero))
            if axis is not None
        )
        return f"{mesh}: {rules}{more}"


def candidates(
    devices: int, used: Collection[str], axes: Sequence[MeshAxis] = AXES
) -> Iterator[Candidate]:
    """Yields every candidate for a number of devices.

    A mesh has only axes of more than one device, in one order: others are the same by
    symmetry. A logical axis is split over one mesh axis.

    Args:
        devices: The number of devices.
        used: The logical axes that the model uses.
        axes: The axes that a mesh may have.
    """
    axes = [a for a in axes if any(n in used for n in a.together or a.each)]
    if devices == 1 or not axes:
        yield Candidate({"data": devices}, {"batch": "data"})
        return
    for sizes in _factors(devices, len(axes)):
        present = [axis for axis, n in zip(axes, sizes, strict=True) if n > 1]
        mesh = {a.name: n for a, n in zip(axes, sizes, strict=True) if n > 1}
        stores = [axis.name for axis in present if axis.stores]
        for choice in itertools.product(*(_choices(axis, used) for axis in present)):
            names = [name for chosen in choice for name in chosen]
            if len(set(names)) < len(names):
                continue
            rules = {
                name: axis.name
                for axis, chosen in zip(present, choice, strict=True)
                for name in chosen
            }
            yield Candidate(mesh, rules)
            for axis_name in stores:
                yield Candidate(mesh, rules, zero=axis_name)
                yield Candidate(mesh, rules, fsdp=axis_name)


def _choices(axis: MeshAxis, used: Collection[str]) -> list[tuple[str, ...]]:
    """Returns the sets of logical axes that a mesh axis may split, none empty."""
    together = tuple(name for name in axis.together if name in used)
    each = [name for name in axis.each if name in used]
    chosen = (
        together + some
        for count in range(len(each), -1, -1)
        for some in itertools.combinations(each, count)
    )
    return [names for names in chosen if names]


def _factors(number: int, parts: int) -> Iterator[tuple[int, ...]]:
    """Yields all tuples of `parts` numbers whose product is `number`."""
    if parts == 1:
        yield (number,)
        return
    for first in range(number, 0, -1):
        if number % first == 0:
            for rest in _factors(number // first, parts - 1):
                yield (first, *rest)
