"""The mesh axes of tile assignments, against those that jax makes of them."""

import itertools
import math

import numpy as np
import pytest
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

from gshard_tf.compat.tile_axes import SubAxis, tile_axes

MESH = {"a": 2, "one": 1, "b": 3, "c": 4}


def tiles_of(mesh, spec):
    """The tile assignment that jax makes of a partition spec."""
    abstract = AbstractMesh(tuple(mesh.values()), tuple(mesh))
    sharding = NamedSharding(abstract, PartitionSpec(*spec))
    hlo = sharding._to_xla_hlo_sharding(len(spec))
    if hlo.is_replicated():
        return np.arange(math.prod(mesh.values())).reshape(*[1] * len(spec), -1)
    devices = np.array(hlo.tile_assignment_devices())
    return devices.reshape(hlo.tile_assignment_dimensions())


def specs(axes):
    """Every way to give some of the axes to two dimensions, in every order."""
    for n in range(len(axes) + 1):
        for used in itertools.permutations(axes, n):
            for cut in range(n + 1):
                yield used[:cut], used[cut:]


@pytest.mark.parametrize("mesh", [MESH, {"a": 2, "b": 2, "c": 2}, {"a": 6, "b": 4}])
def test_whole_axes(mesh):
    for spec in specs([axis for axis, size in mesh.items() if size > 1]):
        found = tile_axes(tiles_of(mesh, spec), 2, mesh)
        sizes = [[SubAxis(a, 1, mesh[a], mesh[a]) for a in axes] for axes in spec]
        assert found == sizes, spec


def test_parts_of_an_axis():
    """The digits of an axis of 8, which jax has as axes of their own."""
    digits = {"4": SubAxis("x", 1, 2, 8), "2": SubAxis("x", 2, 2, 8)}
    digits["1"] = SubAxis("x", 4, 2, 8)
    together = {
        ("4", "2", "1"): [SubAxis("x", 1, 8, 8)],
        ("4", "2"): [SubAxis("x", 1, 4, 8)],
        ("2", "1"): [SubAxis("x", 2, 4, 8)],
    }
    for spec in specs(list(digits)):
        found = tile_axes(tiles_of(dict.fromkeys(digits, 2), spec), 2, {"x": 8})
        for axes, expected in zip(found, spec, strict=True):
            parts = [digits[digit] for digit in expected]
            if len(expected) == 3 and expected not in together:
                continue  # two of them may be one part
            assert axes == together.get(expected, parts), spec


def test_copies_are_in_no_order():
    devices = np.array([[4, 0], [1, 5], [6, 2], [3, 7]])
    assert tile_axes(devices, 1, {"x": 8}) == [[SubAxis("x", 2, 4, 8)]]


def test_other_orders_of_devices_are_no_axes():
    mesh = {"x": 4, "y": 2}
    assert (
        tile_axes(np.array([[1], [0], [2], [3], [4], [5], [6], [7]]), 2, mesh) is None
    )
    assert tile_axes(np.arange(6).reshape(3, 2), 1, {"a": 2, "b": 3}) is None
