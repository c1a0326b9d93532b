"""Partition specs and layouts."""

import gshard_tf
from gshard_tf.sharding.mesh import axis_sizes
from gshard_tf.sharding.partition_spec import layout_of, spec_of


def test_there_and_back():
    mesh = gshard_tf.create_mesh({"data": 4, "model": 2})
    for spec in ((), (None,), ("data", None), (None, "model", "data")):
        layout = layout_of(spec, mesh)
        assert layout.mesh == mesh and layout.rank == len(spec)
        assert spec_of(layout) == spec


def test_sizes_of_axes_in_their_order():
    mesh = gshard_tf.create_mesh([("data", 4), ("model", 2)])
    assert list(axis_sizes(mesh).items()) == [("data", 4), ("model", 2)]
