"""Layouts as HLO shardings, against jax's own translation of the same thing."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorflow.compiler.xla import xla_data_pb2

import gshard_tf
from gshard_tf.layouts.partition_spec import join_axes
from gshard_tf.sharding import op_sharding
from gshard_tf.sharding.mesh_layout import MeshLayout

AXES = ("a", "b", "c")


@st.composite
def layouts(draw):
    """A random layout, of joined axes too, on a random mesh of at most 8 devices."""
    sizes = draw(
        st.lists(st.sampled_from([1, 2, 4, 8]), min_size=1, max_size=3).filter(
            lambda sizes: np.prod(sizes) <= 8
        )
    )
    mesh = gshard_tf.create_mesh(dict(zip(AXES, sizes, strict=False)))
    rank = draw(st.integers(1, 4))
    axes = draw(st.permutations(mesh.dim_names))
    specs = [[] for _ in range(rank)]
    for axis in axes[: draw(st.integers(0, len(axes)))]:
        specs[draw(st.integers(0, rank - 1))].append(axis)
    return MeshLayout(tuple(map(join_axes, specs)), mesh)


def parsed(sharding: bytes):
    """Our bytes, read by jaxlib (which is XLA's own reading of the message)."""
    from jax._src.lib import xla_client

    proto = xla_client.OpSharding()
    proto.ParseFromString(sharding)
    return xla_client.HloSharding.from_proto(proto)


def as_jax(layout):
    import jax
    from jax.sharding import NamedSharding, PartitionSpec

    mesh = layout.mesh
    devices = np.array(jax.devices("cpu")[: mesh.size]).reshape(mesh.shape())
    # Not by `as_jax`, which is ours.
    specs = [tuple(axis.split("+")) if axis else None for axis in layout.spec]
    return NamedSharding(
        jax.sharding.Mesh(devices, mesh.dim_names), PartitionSpec(*specs)
    )


@settings(max_examples=300)
@given(layouts())
def test_from_layout_is_jaxs_own_sharding(layout):
    from jax._src.op_shardings import are_hlo_shardings_equal

    ours = parsed(op_sharding.from_layout(layout))
    theirs = as_jax(layout)._to_xla_hlo_sharding(len(layout.spec))
    assert are_hlo_shardings_equal(ours, theirs), f"{ours} is not {theirs}"


@settings(max_examples=200)
@given(layouts())
def test_from_layout_puts_each_slice_where_jax_and_dtensor_do(layout):
    import jax
    from jax._src.sharding_impls import GSPMDSharding

    rank = len(layout.spec)
    shape = [8] * rank
    ours = GSPMDSharding(
        jax.devices("cpu")[: layout.mesh.size],
        parsed(op_sharding.from_layout(layout)),
    ).devices_indices_map(tuple(shape))
    theirs = as_jax(layout).devices_indices_map(tuple(shape))
    is_dtensors = not any("+" in (axis or "") for axis in layout.spec)
    for i, device in enumerate(jax.devices("cpu")[: layout.mesh.size]):
        assert ours[device] == theirs[device]
        if not is_dtensors:
            continue
        # DTensor counts shards: its offset along a dimension is in shards.
        offsets = layout.to_dtensor().offset_to_shard()[i]
        for d in range(rank):
            start = offsets[d] * 8 // layout.num_shards(d)
            assert (ours[device][d].start or 0) == start


def _message(sharding: bytes):
    return xla_data_pb2.OpSharding.FromString(sharding)


def test_replicated():
    assert _message(op_sharding.replicated()).type == xla_data_pb2.OpSharding.REPLICATED
    layout = MeshLayout.replicated(gshard_tf.create_mesh({"a": 8}), 3)
    assert op_sharding.from_layout(layout) == op_sharding.replicated()


@given(st.permutations(range(8)))
def test_tiled_keeps_the_order_of_the_devices(order):
    # The paper's example, section 3.2: a [3, 16, 64] tensor on a [1, 2, 4] grid.
    message = _message(op_sharding.tiled(np.array(order).reshape(1, 2, 4)))
    assert message.type == xla_data_pb2.OpSharding.OTHER
    assert list(message.tile_assignment_dimensions) == [1, 2, 4]
    assert list(message.tile_assignment_devices) == order


def test_tiled_with_copies_puts_copies_on_neighbours():
    message = _message(op_sharding.tiled_with_copies([1, 4], 8))
    assert message.replicate_on_last_tile_dim
    assert list(message.tile_assignment_dimensions) == [1, 4, 2]
    assert list(message.tile_assignment_devices) == list(range(8))


@pytest.mark.parametrize(
    ("specs", "dimensions", "devices"),
    [
        (["b", "a"], (3, 2), [[0, 3], [1, 4], [2, 5]]),
        ([None, "a"], (1, 2, 3), [[[0, 1, 2], [3, 4, 5]]]),  # the last is of copies
        (["a+b", None], (6, 1), [[0], [1], [2], [3], [4], [5]]),
        (["b+a", None], (6, 1), [[0], [3], [1], [4], [2], [5]]),
        ([None, None], (), None),
    ],
)
def test_the_device_of_each_shard(specs, dimensions, devices):
    mesh = gshard_tf.create_mesh({"a": 2, "b": 3})
    layout = MeshLayout(tuple(specs), mesh)
    sharding = op_sharding.from_layout(layout)
    assert op_sharding.tile_dimensions(sharding) == dimensions
    if devices is None:
        with pytest.raises(ValueError, match="must be tiled"):
            op_sharding.tile_assignment(sharding)
    else:
        assert op_sharding.tile_assignment(sharding).tolist() == devices
