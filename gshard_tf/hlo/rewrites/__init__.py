"""What XLA's partitioner gets wrong, rewritten before it sees it.

Each rewrite is a file with one fault of the partitioner, its condition, and what is put
in its place. `partition_safely` is the one place that applies them.
"""

import dataclasses
from collections.abc import Mapping, Sequence

from gshard_tf.compat.xla_protos import HloModuleProto
from gshard_tf.hlo.rewrites import (
    grouped_convolutions,
    transforms,
    uneven_scatters,
    windows,
)
from gshard_tf.hlo.rewrites.shardings import MeshAxes


@dataclasses.dataclass(frozen=True)
class SafeModule:
    """What `partition_safely` makes of a module.

    Attributes:
        hlo: The serialised module.
        notes: What was rewritten, a sentence for each kind.
    """

    hlo: bytes
    notes: tuple[str, ...] = ()


def partition_safely(
    hlo: bytes, mesh_shape: Mapping[str, int], batch_axes: Sequence[str] = ()
) -> SafeModule:
    """A module of the same values that the partitioner compiles rightly.

    Args:
        hlo: A serialised `HloModuleProto`, not yet partitioned.
        mesh_shape: The size of each axis of the mesh, in its order.
        batch_axes: The axes that the batch is split over; they come first where a
            rewrite has to choose.
    """
    mesh = MeshAxes(mesh_shape, batch_axes)
    if mesh.devices == 1:
        return SafeModule(hlo)
    module = HloModuleProto.FromString(hlo)
    counts = {
        "{} scatters whose rows do not divide by the devices are padded.": (
            uneven_scatters.make_even(module, mesh)
        ),
        "{} convolutions and gradients of maxima hold their images whole along the "
        "windows: height and width are not split there.": (
            windows.keep_whole(module, mesh)
        ),
        # The last two: nothing may be held inside of their manual regions.
        "{} grouped convolutions split the batch alone, over the axes that divide "
        "it.": grouped_convolutions.keep_local(module, mesh),
        "{} Fourier transforms split the first dimension alone, over the axes that "
        "divide it.": transforms.keep_local(module, mesh),
    }
    notes = tuple(note.format(count) for note, count in counts.items() if count)
    return SafeModule(module.SerializeToString() if notes else hlo, notes)
