"""Layouts: the mesh axes over which each dimension of a tensor is split, and the mesh.

DTensor's `Layout` splits a dimension over one axis of its mesh, and its `Mesh` numbers
devices in one order, so that no mesh of it has two axes joined in the other. Hence a
type of our own. Where a dimension has one axis at most, it is a `dtensor.Layout` too.
"""

import dataclasses
from collections.abc import Mapping

from tensorflow.experimental import dtensor

from gshard_tf.layouts.partition_spec import PartitionSpec, axes_of, parts_over
from gshard_tf.sharding.mesh import axis_sizes


@dataclasses.dataclass(frozen=True)
class MeshLayout:
    """A partition spec on a mesh.

    Attributes:
        spec: The axis of each dimension; None: it is whole.
        mesh: The mesh.
    """

    spec: PartitionSpec
    mesh: dtensor.Mesh

    @classmethod
    def replicated(cls, mesh: dtensor.Mesh, rank: int) -> "MeshLayout":
        """The layout of a tensor that every device holds whole."""
        return cls((None,) * rank, mesh)

    @classmethod
    def from_dtensor(cls, layout: dtensor.Layout) -> "MeshLayout":
        """The same layout."""
        specs = layout.sharding_specs
        return cls(
            tuple(None if axis == dtensor.UNSHARDED else axis for axis in specs),
            layout.mesh,
        )

    def to_dtensor(self) -> dtensor.Layout:
        """The same layout as DTensor's.

        Raises:
            ValueError: when a dimension is split over several axes.
        """
        if any(len(axes_of(axis)) > 1 for axis in self.spec):
            raise ValueError(
                "A dtensor.Layout must split a dimension over one mesh axis at most. "
                f"Received: the partition spec {self.spec}"
            )
        return dtensor.Layout(
            [dtensor.UNSHARDED if axis is None else axis for axis in self.spec],
            self.mesh,
        )

    @property
    def axes(self) -> tuple[str, ...]:
        """The mesh axes that split a dimension."""
        return tuple(name for axis in self.spec for name in axes_of(axis))

    def num_shards(self, dimension: int) -> int:
        """The number of shards along a dimension."""
        return parts_over(self.spec[dimension], axis_sizes(self.mesh))

    def with_axes(self, axes: Mapping[int, str | None]) -> "MeshLayout":
        """The layout with the axes of some dimensions replaced."""
        spec = tuple(axes.get(d, axis) for d, axis in enumerate(self.spec))
        return MeshLayout(spec, self.mesh)
