"""Partition specs: the mesh axis, or None, of each dimension of a tensor."""

from collections.abc import Sequence

from tensorflow.experimental import dtensor

PartitionSpec = tuple[str | None, ...]


def spec_of(layout: dtensor.Layout) -> PartitionSpec:
    """Returns the mesh axis over which each dimension is split; None: it is whole."""
    return tuple(
        None if axis == dtensor.UNSHARDED else axis for axis in layout.sharding_specs
    )


def layout_of(spec: Sequence[str | None], mesh: dtensor.Mesh) -> dtensor.Layout:
    """Returns the DTensor layout of a partition spec on a mesh."""
    return dtensor.Layout(
        [dtensor.UNSHARDED if axis is None else axis for axis in spec], mesh
    )
