"""Layouts as HLO shardings: the one place that translates, for all of GShard.

When Shardy takes over from GSPMD's propagation, this file changes and no layer does.
"""

import numpy as np
from tensorflow.experimental import dtensor

from gshard_tf.compat.xla_sharding import (
    constrain,
    partially_tiled,
    replicated,
    tiled,
)

__all__ = [
    "constrain",
    "from_layout",
    "replicated",
    "tiled",
    "tiled_with_copies",
]


def tiled_with_copies(tiles: list[int], num_devices: int) -> bytes:
    """Fewer slices than devices: neighbors hold copies of the same slice."""
    copies = num_devices // int(np.prod(tiles))
    return partially_tiled(np.arange(num_devices).reshape(tiles + [copies]))


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
    return partially_tiled(devices.reshape(tiles + [copies]))
