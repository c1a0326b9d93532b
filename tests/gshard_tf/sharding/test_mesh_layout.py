"""Layouts on a mesh: as DTensor's and back."""

import pytest

import gshard_tf
from gshard_tf.sharding.mesh import axis_sizes
from gshard_tf.sharding.mesh_layout import MeshLayout

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


def test_sizes_of_axes_in_their_order():
    mesh = gshard_tf.create_mesh([("data", 4), ("model", 2)])
    assert list(axis_sizes(mesh).items()) == [("data", 4), ("model", 2)]
