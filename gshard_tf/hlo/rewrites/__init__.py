"""Rewrites of modules around faults of XLA's partitioner.

Each file describes one fault of the partitioner, its condition, and its replacement.
`partition_safely` applies all of them.
"""

import dataclasses
from collections.abc import Mapping, Sequence

from gshard_tf.compat.xla_protos import HloModuleProto
from gshard_tf.hlo.rewrites import (
    grouped_convolutions,
    idle_gaps,
    transforms,
    uneven_scatters,
    windows,
)
from gshard_tf.hlo.rewrites.shardings import MeshAxes


@dataclasses.dataclass(frozen=True)
class SafeModule:
    """The result of `partition_safely`.

    Attributes:
        hlo: The serialized module.
        notes: The rewrites that were applied, a sentence for each kind.
    """

    hlo: bytes
    notes: tuple[str, ...] = ()


def partition_safely(
    hlo: bytes, mesh_shape: Mapping[str, int], batch_axes: Sequence[str] = ()
) -> SafeModule:
    """Returns a module of the same values that the partitioner compiles correctly.

    Args:
        hlo: A serialized `HloModuleProto`, not yet partitioned.
        mesh_shape: The size of each axis of the mesh, in its order.
        batch_axes: The axes that the batch is split over. A rewrite that must choose
            axes takes them first.
    """
    mesh = MeshAxes(mesh_shape, batch_axes)
    if mesh.devices == 1:
        return SafeModule(hlo)
    module = HloModuleProto.FromString(hlo)
    counts = {
        "{} scatters whose rows do not divide by the devices are padded.": (
            uneven_scatters.make_even(module, mesh)
        ),
        "{} gradients of slices of one element have no gaps, which would be between "
        "elements.": idle_gaps.drop(module),
        "{} convolutions and gradients of maxima hold their images whole along the "
        "windows: height and width are not split there.": (
            windows.keep_whole(module, mesh)
        ),
        # The last two, because no sharding may be set inside their manual regions.
        "{} grouped convolutions split the batch alone, over the axes that divide "
        "it.": grouped_convolutions.keep_local(module, mesh),
        "{} Fourier transforms split the first dimension alone, over the axes that "
        "divide it.": transforms.keep_local(module, mesh),
    }
    notes = tuple(note.format(count) for note, count in counts.items() if count)
    return SafeModule(module.SerializeToString() if notes else hlo, notes)
