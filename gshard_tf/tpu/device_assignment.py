"""Device assignment: the core of a TPU slice at each position of a mesh."""

import itertools
import math

import numpy as np
import tensorflow as tf
from tensorflow.experimental import dtensor

from gshard_tf.runtime.core_order import matching_directions
from gshard_tf.sharding.mesh import axis_sizes


def assign_cores(
    topology: tf.tpu.experimental.Topology, mesh: dtensor.Mesh
) -> tf.tpu.experimental.DeviceAssignment:
    """Returns the cores of each replica, in the order of the mesh.

    A replica is a box of the slice, and the whole slice is filled with replicas.
    Partition `i` of a program runs on logical core `i`, and XLA lays a mesh out in the
    order of its positions, last axis fastest. So each mesh axis gets directions of the
    box of its own where sizes allow it, the last one those with the shortest way (the
    cores of a chip first). A mesh of one axis goes round a ring of the box.

    Args:
        topology: The result of `tf.tpu.experimental.initialize_tpu_system`.
        mesh: The mesh of one replica.

    Raises:
        ValueError: when the slice is not a whole number of such meshes.
    """
    slice_shape = [int(n) for n in topology.mesh_shape]
    cores = topology.num_tasks * topology.num_tpus_per_task
    if cores % mesh.size:
        raise ValueError(
            f"The {cores} cores of the slice must be a whole number of meshes. "
            f"Received: mesh={axis_sizes(mesh)} with {mesh.size} cores"
        )
    # (Every divisor of the slice's size is the size of some box.)
    boxes = _boxes(slice_shape, mesh.size)
    sizes = [int(n) for n in mesh.shape() if n > 1]
    fitting = [
        (box, order) for box in boxes if (order := matching_directions(box, sizes))
    ]
    box = fitting[0][0] if fitting else boxes[0]
    built = tf.tpu.experimental.DeviceAssignment.build(
        topology, computation_shape=box, num_replicas=cores // mesh.size
    )
    if len(sizes) < 2 or not fitting:
        return built
    order = fitting[0][1]
    # [R, N, 4], each replica sorted by its slowest direction, then the next, ...
    assignment = np.array(built.core_assignment)
    for replica in assignment:
        keys = [replica[:, direction] for direction in order]
        replica[:] = replica[np.lexsort(keys)]
    return tf.tpu.experimental.DeviceAssignment(topology, assignment)


def _boxes(slice_shape: list[int], size: int) -> list[tuple[int, ...]]:
    """Returns boxes of `size` cores that tile a slice, whole chips and cubes first."""
    divisors = [[d for d in range(1, n + 1) if n % d == 0] for n in slice_shape]
    fitting = [box for box in itertools.product(*divisors) if math.prod(box) == size]
    return sorted(fitting, key=lambda box: (-box[3], max(box[:3]), [-n for n in box]))
