"""Partition specs, and layouts as DTensor's and back."""

import numpy as np
import pytest

import gshard_tf
from gshard_tf.sharding.mesh import axis_sizes
from gshard_tf.sharding.mesh_layout import MeshLayout
from gshard_tf.sharding.partition_spec import as_jax, axes_of, join_axes, part_at

MESH = gshard_tf.create_mesh({"data": 4, "model": 2})


def test_to_dtensor_and_back():
    for spec in ((), (None,), ("data", None), (None, "model", "data")):
        layout = MeshLayout(spec, MESH)
        there = layout.to_dtensor()
        assert there.mesh == MESH and there.rank == len(spec)
        assert MeshLayout.from_dtensor(there) == layout
        assert [there.num_shards(d) for d in range(len(spec))] == [
            layout.num_shards(d) for d in range(len(spec))
        ]


def test_dtensor_has_no_layout_for_joined_axes():
    layout = MeshLayout(("data+model", None), MESH)
    assert layout.num_shards(0) == 8 and layout.axes == ("data", "model")
    with pytest.raises(ValueError, match=r"over one mesh axis.*'data\+model'"):
        layout.to_dtensor()


def test_joined_axes():
    assert join_axes(()) is None and axes_of(None) == ()
    for names in (("data",), ("model", "data")):
        assert axes_of(join_axes(names)) == names
    assert as_jax(("model+data", None, "data")) == (("model", "data"), None, "data")


def test_part_of_each_device():
    # numpy's own order of several indices: the last one is the fastest.
    sizes = {"a": 2, "b": 3, "c": 2}
    for index in np.ndindex(*sizes.values()):
        at = dict(zip(sizes, index, strict=True))
        for names in (("a", "b"), ("c", "a"), ("b", "c", "a"), ("b",)):
            expected = np.ravel_multi_index(
                [at[name] for name in names], [sizes[name] for name in names]
            )
            assert part_at("+".join(names), at, sizes) == expected
    assert part_at(None, {"a": 1}, {"a": 2}) == 0


def test_sizes_of_axes_in_their_order():
    mesh = gshard_tf.create_mesh([("data", 4), ("model", 2)])
    assert list(axis_sizes(mesh).items()) == [("data", 4), ("model", 2)]
