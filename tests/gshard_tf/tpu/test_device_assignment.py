"""The core of a slice at each position of a mesh."""

import numpy as np
import pytest
import tensorflow as tf

import gshard_tf
from gshard_tf.tpu.device_assignment import assign_cores


def topology(*shape):
    coordinates = [
        [x, y, z, c]
        for z in range(shape[2])
        for y in range(shape[1])
        for x in range(shape[0])
        for c in range(shape[3])
    ]
    return tf.tpu.experimental.Topology(
        mesh_shape=list(shape), device_coordinates=np.array([coordinates], np.int32)
    )


@pytest.mark.parametrize(
    ("shape", "mesh", "replicas"),
    [
        ((2, 4, 1, 1), {"expert": 8}, 1),
        ((2, 4, 1, 1), {"expert": 2}, 4),
        ((4, 4, 1, 2), {"data": 4, "model": 8}, 1),
        ((4, 4, 4, 1), {"data": 4, "model": 4}, 4),
        ((2, 2, 2, 1), {"a": 2, "b": 2, "c": 2}, 1),
    ],
)
def test_every_core_once(shape, mesh, replicas):
    assignment = assign_cores(topology(*shape), gshard_tf.create_mesh(mesh, "TPU"))
    assert assignment.num_replicas == replicas
    cores = assignment.core_assignment.reshape(-1, 4).tolist()
    assert len({tuple(core) for core in cores}) == len(cores) == np.prod(shape)


@pytest.mark.parametrize(
    ("shape", "sizes"),
    [
        ((2, 4, 1, 1), (4, 2)),
        ((2, 4, 1, 1), (2, 4)),
        ((4, 4, 1, 2), (4, 8)),
        ((4, 4, 4, 1), (16, 4)),
        ((2, 2, 2, 1), (2, 2, 2)),
    ],
)
def test_axes_of_a_mesh_are_directions_of_the_slice(shape, sizes):
    mesh = gshard_tf.create_mesh([(f"a{i}", n) for i, n in enumerate(sizes)], "TPU")
    assignment = assign_cores(topology(*shape), mesh)
    cores = assignment.core_assignment[0].reshape(*sizes, 4)
    # No two axes share a coordinate that changes along them.
    changing = [
        {d for d in range(4) if np.ptp(cores[..., d], axis=axis).any()}
        for axis in range(len(sizes))
    ]
    assert sum(map(len, changing)) == len(set.union(*changing))


def test_cores_of_a_chip_are_neighbors_on_the_last_axis():
    mesh = gshard_tf.create_mesh({"data": 4, "model": 8}, "TPU")
    assignment = assign_cores(topology(4, 4, 1, 2), mesh)
    cores = assignment.core_assignment[0]
    assert (cores[0::2, :3] == cores[1::2, :3]).all()


@pytest.mark.parametrize("mesh", [{"expert": 3}, {"expert": 16}, {"data": 3, "b": 2}])
def test_refuses_a_mesh_that_does_not_fit(mesh):
    with pytest.raises(ValueError, match="whole number of meshes. Received: mesh="):
        assign_cores(topology(2, 4, 1, 1), gshard_tf.create_mesh(mesh, "TPU"))


def test_a_replica_takes_whole_chips():
    assignment = assign_cores(
        topology(2, 2, 1, 2), gshard_tf.create_mesh({"expert": 2}, "TPU")
    )
    cores = assignment.core_assignment  # [replicas, cores, 4]
    assert (cores[:, 0, :3] == cores[:, 1, :3]).all()
