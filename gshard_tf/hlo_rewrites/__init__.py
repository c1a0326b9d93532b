"""What XLA's partitioner gets wrong, rewritten before it sees it.

Each rewrite is a file with one fault of the partitioner, its condition, and what is put
in its place. `partition_safely` is the one place that applies them.
"""

from collections.abc import Mapping, Sequence

from tensorflow.compiler.xla.service import hlo_pb2

from gshard_tf.hlo_rewrites import (
    grouped_convolutions,
    uneven_scatters,
    windows,
)


def partition_safely(
    hlo: bytes, mesh_shape: Mapping[str, int], batch_axes: Sequence[str] = ()
) -> bytes:
    """An HLO module of the same values that the partitioner compiles rightly.

    Args:
        hlo: A serialised `HloModuleProto`, not yet partitioned.
        mesh_shape: The size of each axis of the mesh, in its order.
        batch_axes: The axes that the batch is split over; they come first where a
            rewrite has to choose.

    Returns:
        The rewritten module, or `hlo` itself where nothing needs it.
    """
    if all(size == 1 for size in mesh_shape.values()):
        return hlo
    module = hlo_pb2.HloModuleProto.FromString(hlo)
    changed = uneven_scatters.make_even(module, mesh_shape, batch_axes)
    changed |= windows.keep_whole(module, mesh_shape)
    # The last: nothing may be held inside of its manual regions.
    changed |= grouped_convolutions.keep_local(module, mesh_shape, batch_axes)
    return module.SerializeToString() if changed else hlo
