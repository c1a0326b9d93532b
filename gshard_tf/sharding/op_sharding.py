"""Layouts as HLO shardings: the one place that translates, for all of GShard.

When Shardy takes over from GSPMD's propagation, this file changes and no layer does.
"""

import numpy as np
import tensorflow as tf

# Private APIs: neither the annotating operation nor the builder of XLA's OpSharding
# messages has a public export. On an upgrade, check that the operation still has its
# gradient (the same annotation) and that `tile` and `partial_tile` still count
# devices by their position in the mesh.
from tensorflow.compiler.tf2xla.python import xla as tf2xla
from tensorflow.core.framework import attr_value_pb2
from tensorflow.experimental import dtensor
from tensorflow.python.compiler.xla.experimental import xla_sharding

from gshard_tf.compat.xla_protos import xla_data_pb2


def constrain(tensor: tf.Tensor, sharding: bytes) -> tf.Tensor:
    """Adds a serialised sharding to a symbolic tensor."""
    constrained = tf2xla.sharding(tensor, sharding=sharding)
    # TPUStrategy's bridge looks at this attribute; the gradient's operation has it too.
    constrained.op._set_attr("_XlaSharding", attr_value_pb2.AttrValue(s=sharding))
    constrained.set_shape(tensor.shape)
    return constrained


def replicated() -> bytes:
    """Every device holds the whole tensor."""
    return xla_sharding.Sharding.replicate().proto.SerializeToString()


def tiled(device_assignment: np.ndarray) -> bytes:
    """The paper's `shard`: slice `[i, j, ...]` is on device `assignment[i, j, ...]`."""
    return xla_sharding.Sharding.tile(device_assignment).proto.SerializeToString()


def tiled_with_copies(tiles: list[int], num_devices: int) -> bytes:
    """Fewer slices than devices: neighbours hold copies of the same slice."""
    copies = num_devices // int(np.prod(tiles))
    devices = np.arange(num_devices).reshape(tiles + [copies])
    return xla_sharding.Sharding.partial_tile(devices).proto.SerializeToString()


def from_layout(layout: dtensor.Layout) -> bytes:
    """The sharding that a DTensor layout stands for.

    Mesh axes that the layout does not use hold copies.
    """
    mesh = layout.mesh
    names = list(mesh.dim_names)
    used = [spec for spec in layout.sharding_specs if spec != dtensor.UNSHARDED]
    if not used:
        return replicated()
    unused = [name for name in names if name not in used]
    devices = np.arange(mesh.size).reshape(mesh.shape())
    # [*mesh] -> [*axes in the order of the tensor's dimensions, copies]
    devices = devices.transpose([names.index(name) for name in used + unused])
    tiles = [
        1 if spec == dtensor.UNSHARDED else mesh.dim_size(spec)
        for spec in layout.sharding_specs
    ]
    copies = mesh.size // int(np.prod(tiles))
    if copies == 1:
        return tiled(devices.reshape(tiles))
    sharding = xla_sharding.Sharding.partial_tile(devices.reshape(tiles + [copies]))
    return sharding.proto.SerializeToString()


def tile_dimensions(sharding: bytes) -> tuple[int, ...]:
    """Returns the number of shards along each dimension, then that of copies if any.

    Empty for a sharding that is not tiled.
    """
    proto = xla_data_pb2.OpSharding.FromString(sharding)
    return tuple(proto.tile_assignment_dimensions)


def tile_assignment(sharding: bytes) -> np.ndarray:
    """Returns the device of each shard, an array of shape `tile_dimensions(sharding)`.

    Flattened, it is the order in which TensorFlow and XLA list the shards of a tensor.

    Raises:
        ValueError: when the sharding is not tiled.
    """
    proto = xla_data_pb2.OpSharding.FromString(sharding)
    if not proto.tile_assignment_dimensions:
        raise ValueError(f"`sharding` must be tiled. Received: sharding={proto}")
    devices = np.array(proto.tile_assignment_devices)
    return devices.reshape(proto.tile_assignment_dimensions)
