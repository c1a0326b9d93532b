"""The mesh axes that a tile assignment splits each dimension over."""

import dataclasses
import math
from collections.abc import Mapping

import numpy as np


@dataclasses.dataclass(frozen=True)
class SubAxis:
    """A mesh axis, or the part of one that is its digit in a mixed radix.

    Attributes:
        axis: The name of the axis.
        pre_size: The product of the digits above it; 1: it is the first.
        size: The values of the digit.
        axis_size: The size of the axis.
    """

    axis: str
    pre_size: int
    size: int
    axis_size: int


def tile_axes(
    devices: np.ndarray, rank: int, mesh_axes: Mapping[str, int]
) -> list[list[SubAxis]] | None:
    """Returns the axes of each dimension, major first, of a sharding on a mesh.

    Args:
        devices: The positions in the mesh of the devices that hold each tile. The
            dimensions after the first `rank` are copies.
        rank: The tensor's number of dimensions.
        mesh_axes: The size of each axis of the mesh, in its order.

    Returns:
        The axes of each dimension; None where the tiles are not on this mesh's devices
        in the order of its axes.
    """
    # Copies are in no order.
    devices = np.sort(devices.reshape(*devices.shape[:rank], -1), axis=-1)
    found = []
    for d in range(rank):
        along = np.moveaxis(devices, d, 0).reshape(devices.shape[d], -1)[:, 0]
        axes = _factors(along - along[0], mesh_axes)
        if axes is None:
            return None
        found.append(axes)
    return found if np.array_equal(devices, _devices(found, mesh_axes)) else None


def _factors(steps: np.ndarray, mesh_axes: Mapping[str, int]) -> list[SubAxis] | None:
    """Decomposes the device of each index, relative to that of index 0."""
    strides, stride = {}, math.prod(mesh_axes.values())
    for name, size in mesh_axes.items():
        stride //= size
        strides[name] = stride
    axes: list[SubAxis] = []
    while len(steps) > 1:
        step = int(steps[1])
        axis = next(
            (a for a, n in mesh_axes.items() if strides[a] <= step < strides[a] * n),
            None,
        )
        if axis is None or step % strides[axis]:
            return None
        below = step // strides[axis]
        if mesh_axes[axis] % below:
            return None
        # As many steps as there are, within the axis.
        left = mesh_axes[axis] // below
        size = max(
            n
            for n in range(1, left + 1)
            if left % n == 0
            and len(steps) % n == 0
            and np.array_equal(steps[:n], step * np.arange(n))
        )
        if size == 1:
            return None
        sub_axis = SubAxis(axis, left // size, size, mesh_axes[axis])
        major = axes[0] if axes else None
        if major is not None and major.axis == axis:
            if sub_axis.pre_size * size == major.pre_size:
                sub_axis = dataclasses.replace(sub_axis, size=size * major.size)
                axes.pop(0)
        axes.insert(0, sub_axis)
        steps = steps[::size]
    return axes


def _devices(
    dimensions: list[list[SubAxis]], mesh_axes: Mapping[str, int]
) -> np.ndarray:
    """Returns the devices that hold each tile, in ascending order."""
    shape = list(mesh_axes.values())
    indices = np.indices(shape).reshape(len(shape), -1)
    coordinates = dict(zip(mesh_axes, indices, strict=True))
    tiles = [math.prod(s.size for s in axes) for axes in dimensions]
    tile = np.zeros(math.prod(shape), np.int64)
    for axes in dimensions:
        for s in axes:
            below = s.axis_size // (s.pre_size * s.size)
            tile = tile * s.size + coordinates[s.axis] // below % s.size
    return np.argsort(tile, kind="stable").reshape(*tiles, -1)
