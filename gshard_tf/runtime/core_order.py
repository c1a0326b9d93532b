"""Order of the cores of a TPU slice in a mesh: neighbours stand near each other."""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np


def order_cores(devices: Sequence[Any], mesh_shape: Sequence[int]) -> list[Any]:
    """Returns the cores of a slice in the order of a mesh, last axis fastest.

    A mesh of one axis goes round a ring of the slice, each core one link from the next.
    With more, each axis gets directions of the slice of its own where sizes allow it,
    the last one the cores of a chip first. The cores of a process stay together, and
    processes in their order, so that a process has rows of a batch that follow each
    other. Where that cannot be, the order is the given one.

    Args:
        devices: jax's devices, process after process.
        mesh_shape: The size of each axis.
    """
    devices = list(devices)
    if any(getattr(device, "coords", None) is None for device in devices):
        return devices
    places = np.array([[*each.coords, each.core_on_chip] for each in devices])
    places -= places.min(axis=0)
    box = tuple(int(n) for n in places.max(axis=0) + 1)
    sizes = [int(n) for n in mesh_shape if n > 1]
    if math.prod(box) != len(devices) or math.prod(sizes) != len(devices):
        return devices  # a part of a slice
    if len(sizes) > 1:
        directions = matching_directions(box, sizes)
        if directions is None:
            return devices
        order = np.lexsort([places[:, d] for d in directions])
        candidates = [[devices[i] for i in order]]
    else:
        at = {tuple(map(int, p)): d for p, d in zip(places, devices, strict=True)}
        rings = [
            [at[*chip, core] for chip in chips for core in range(box[3])]
            for chips in _rings(box[:3])
        ]
        candidates = [
            _from_first_process(each) for ring in rings for each in (ring, ring[::-1])
        ]
    processes = sorted(device.process_index for device in devices)
    for candidate in candidates:
        if [device.process_index for device in candidate] == processes:
            return candidate
    return devices


def matching_directions(
    box: Sequence[int], sizes: Sequence[int]
) -> tuple[int, ...] | None:
    """Returns directions of a box, fastest first, that match the axes of a mesh.

    Args:
        box: Sizes along x, y, z, and the cores of a chip.
        sizes: Those of the axes, outermost first.
    """
    axis_steps = set(itertools.accumulate(reversed(sizes), lambda a, b: a * b))
    for order in itertools.permutations((3, 0, 1, 2)):
        steps = itertools.accumulate((box[d] for d in order), lambda a, b: a * b)
        if axis_steps <= set(steps):
            return order
    return None


def _snake(box: Sequence[int]) -> list[tuple[int, ...]]:
    """Returns the places of a box, each one step from the next."""
    if not box:
        return [()]
    rest = _snake(box[1:])
    return [
        (i, *each)
        for i in range(box[0])
        for each in (rest if i % 2 == 0 else rest[::-1])
    ]


def _rings(box: Sequence[int]) -> list[list[tuple[int, ...]]]:
    """Returns orders of a box's places, each one step from the next, and back at last.

    Where a box has no such ring (a line, or an odd number of places), a snake.
    """
    rings = []
    for direction, rows in enumerate(box):
        path = _snake([n for d, n in enumerate(box) if d != direction])
        if rows % 2 == 0 and len(path) > 1:
            # Row after row to and fro, but for the first column, which leads back.
            places = [(0, path[0])]
            for row in range(rows):
                columns = path[1:] if row % 2 == 0 else path[:0:-1]
                places += [(row, column) for column in columns]
            places += [(row, path[0]) for row in range(rows - 1, 0, -1)]
            rings.append(
                [(*other[:direction], row, *other[direction:]) for row, other in places]
            )
    return rings or [_snake(box)]


def _from_first_process(ring: list[Any]) -> list[Any]:
    """A ring from where the cores of the first process begin."""
    first = min(device.process_index for device in ring)
    for i, device in enumerate(ring):
        if device.process_index == first != ring[i - 1].process_index:
            return ring[i:] + ring[:i]
    return ring
