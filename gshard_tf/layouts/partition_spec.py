"""Partition specs: the mesh axes, or None, of each dimension of a tensor.

Several axes of one dimension are one joined axis, `"data+fsdp"`: the parts of the first
axis are cut along the second, as `jax.sharding.PartitionSpec(("data", "fsdp"))` has it.

This file needs no TensorFlow: exported programs and `gshard-plan --help` read layouts
without it.
"""

import math
from collections.abc import Iterable, Mapping

PartitionSpec = tuple[str | None, ...]

_JOINT = "+"


def join_axes(axes: Iterable[str]) -> str | None:
    """Returns the name of some mesh axes as one, the outermost first; None: none."""
    return _JOINT.join(axes) or None


def axes_of(axis: str | None) -> tuple[str, ...]:
    """Returns the mesh axes that one of a partition spec is, the outermost first."""
    return () if axis is None else tuple(axis.split(_JOINT))


def parts_over(axis: str | None, sizes: Mapping[str, int]) -> int:
    """Returns the number of parts along an axis of a partition spec.

    Args:
        axis: The axis, which may be a joined one; or None.
        sizes: The size of each axis of the mesh.
    """
    return math.prod(sizes[name] for name in axes_of(axis))


def part_at(
    axis: str | None, position: Mapping[str, int], sizes: Mapping[str, int]
) -> int:
    """Returns the number of the part that a device has along an axis.

    Args:
        axis: The axis, as in `parts_over`.
        position: The place of the device along each axis of the mesh.
        sizes: The size of each axis of the mesh.
    """
    part = 0
    for name in axes_of(axis):
        part = part * sizes[name] + position[name]
    return part


def as_jax(spec: PartitionSpec) -> tuple[str | tuple[str, ...] | None, ...]:
    """Returns the entries of jax's `PartitionSpec`."""
    return tuple(collective_axis(axis) for axis in spec)


def collective_axis(axis: str | None) -> str | tuple[str, ...] | None:
    """Returns an axis of a partition spec as collectives of jax name it."""
    names = axes_of(axis)
    return names if len(names) > 1 else axis
