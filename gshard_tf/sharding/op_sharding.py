"""Layouts as HLO shardings: the one place that translates, for all of GShard.

They are GSPMD's. Where jax compiles a step, `gshard_tf.compat.shardy` turns them into
Shardy's; TensorFlow's runtime for TPUs takes them as they are.
"""

import numpy as np

from gshard_tf.compat.xla_protos import OpSharding
from gshard_tf.compat.xla_sharding import (
    constrain,
    partially_tiled,
    replicated,
    tiled,
)
from gshard_tf.sharding.mesh_layout import MeshLayout

__all__ = [
    "constrain",
    "from_layout",
    "replicated",
    "tile_assignment",
    "tile_dimensions",
    "tiled",
    "tiled_with_copies",
]


def tiled_with_copies(tiles: list[int], num_devices: int) -> bytes:
    """Fewer slices than devices: neighbors hold copies of the same slice."""
    copies = num_devices // int(np.prod(tiles))
    return partially_tiled(np.arange(num_devices).reshape(tiles + [copies]))


def from_layout(layout: MeshLayout) -> bytes:
    """The sharding that a layout stands for.

    Mesh axes that the layout does not use hold copies.
    """
    mesh = layout.mesh
    names = list(mesh.dim_names)
    used = list(layout.axes)
    if not used:
        return replicated()
    unused = [name for name in names if name not in used]
    devices = np.arange(mesh.size).reshape(mesh.shape())
    # [*mesh] -> [*axes in the order of the tensor's dimensions, copies]
    devices = devices.transpose([names.index(name) for name in used + unused])
    tiles = [layout.num_shards(d) for d in range(len(layout.spec))]
    copies = mesh.size // int(np.prod(tiles))
    if copies == 1:
        return tiled(devices.reshape(tiles))
    return partially_tiled(devices.reshape(tiles + [copies]))


def tile_dimensions(sharding: bytes) -> tuple[int, ...]:
    """Returns the number of shards along each dimension, then that of copies if any.

    Empty for a sharding that is not tiled.
    """
    return tuple(OpSharding.FromString(sharding).tile_assignment_dimensions)


def tile_assignment(sharding: bytes) -> np.ndarray:
    """Returns the device of each shard, an array of shape `tile_dimensions(sharding)`.

    Flattened, it is the order in which TensorFlow and XLA list the shards of a tensor.

    Raises:
        ValueError: when the sharding is not tiled.
    """
    proto = OpSharding.FromString(sharding)
    if not proto.tile_assignment_dimensions:
        raise ValueError(f"`sharding` must be tiled. Received: sharding={proto}")
    devices = np.array(proto.tile_assignment_devices)
    return devices.reshape(proto.tile_assignment_dimensions)
