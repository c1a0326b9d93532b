"""Storage of one variable on the cores of a TPU: a shard, or a copy, per core."""

import functools
import itertools
import math
import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from gshard_tf.compat import tf_saving
from gshard_tf.compat.tensorflow import out_of_graphs
from gshard_tf.compat.tf_variables import ResourceVariable
from gshard_tf.layouts.partition_spec import part_at
from gshard_tf.sharding import op_sharding
from gshard_tf.sharding.initial_value import InitialValue
from gshard_tf.sharding.mesh import axis_sizes
from gshard_tf.sharding.mesh_layout import MeshLayout
from gshard_tf.sharding.regions import Region, whole
from gshard_tf.sharding.sharded_variable import MeshVariableBase
from gshard_tf.sharding.variable_layouts import VariableLayouts

# The number of a shard along each dimension.
Coordinates = tuple[int, ...]


class Storage:
    """The shards of one variable, created when they are first used.

    By then a layer has named the axes of its weight (`gshard_tf.name_axes` comes after
    `add_weight`), so that nothing is ever stored whole that is to be sharded.

    Args:
        devices: Names of the cores, `[replicas][cores of a replica]`.
        layouts: Decides how variables are sharded.
        initial: The first value.
        name: The variable's name.
        trainable: As in `tf.Variable`.
    """

    def __init__(
        self,
        devices: np.ndarray,
        layouts: VariableLayouts,
        initial: InitialValue,
        name: str,
        trainable: bool,
    ):
        self.devices = devices
        self.name = name
        self.shape = initial.shape
        self.dtype = initial.dtype
        self.trainable = trainable
        self._layouts = layouts
        self._initial: InitialValue | None = initial
        self._owner: weakref.ref[MeshVariableBase] | None = None
        self._cores: list[list[Any]] = []

    def set_owner(self, owner: MeshVariableBase) -> None:
        """Sets the variable whose storage it is: the one that layers and users see."""
        self._owner = weakref.ref(owner)

    @property
    def layout(self) -> MeshLayout:
        owner = None if self._owner is None else self._owner()
        if owner is None:
            raise RuntimeError(
                f"The variable of this storage must exist. Received: name={self.name!r}"
            )
        return self._layouts.layout_for(owner).storage

    def core_variables(self, replica: int) -> list[Any]:
        """Returns the variable of each core of a replica, in the order of the mesh."""
        if self._initial is not None:
            # In eager mode also where a SavedModel's graph is being built.
            with out_of_graphs():
                self._cores = self._create(self._initial)
            self._initial = None
        return self._cores[replica]

    @functools.cached_property
    def exported_whole(self) -> Any:
        """The variable that an exported function reads in place of the shards.

        It has no value. When the SavedModel is loaded, the variable that takes its
        place gets the value that was saved, shard by shard.
        """
        with out_of_graphs(), tf.device("CPU:0"):
            return tf_saving.uninitialized_variable(self.shape, self.dtype, self.name)

    def _create(self, initial: InitialValue) -> list[list[Any]]:
        coordinates = self.shard_coordinates()
        distinct = list(dict.fromkeys(coordinates))
        cores = range(len(coordinates))
        variables: list[list[Any]] = [[None] * len(cores) for _ in self.devices]
        read = initial.reader()
        # One shard after the other, so that the host holds no more than it must.
        for shard in distinct:
            value = read(self.shard_region(shard))
            for replica, core in itertools.product(range(len(variables)), cores):
                if coordinates[core] != shard:
                    continue
                with tf.device(self.devices[replica][core]):
                    # (In a strategy's scope `tf.Variable` would come back here.)
                    variables[replica][core] = ResourceVariable(
                        value,
                        dtype=self.dtype,
                        trainable=self.trainable,
                        name=f"{self.name}/r{replica}/core{core}",
                    )
        return variables

    # -- which shard is on which core ----------------------------------------------

    @property
    def shards_per_dimension(self) -> list[int]:
        layout = self.layout
        return [layout.num_shards(d) for d in range(len(layout.spec))]

    @property
    def is_sharded(self) -> bool:
        return math.prod(self.shards_per_dimension) > 1

    def shard_coordinates(self) -> list[Coordinates]:
        """Returns the coordinates of each core's shard, in the order of the mesh."""
        layout = self.layout
        sizes = axis_sizes(layout.mesh)
        coordinates = []
        for position in np.ndindex(*sizes.values()):
            at = dict(zip(sizes, map(int, position), strict=True))
            coordinates.append(tuple(part_at(axis, at, sizes) for axis in layout.spec))
        return coordinates

    def shard_index(self, coordinates: Coordinates) -> tuple[slice, ...]:
        """Returns the slices of a shard in the whole; () for a whole."""
        if not self.is_sharded:
            return ()
        counts = self.shards_per_dimension
        sizes = [n // count for n, count in zip(self.shape, counts, strict=True)]
        return tuple(
            slice(i * n, (i + 1) * n) for i, n in zip(coordinates, sizes, strict=True)
        )

    def shard_region(self, coordinates: Coordinates) -> Region:
        """Returns the region of a shard, that of a whole too."""
        index = self.shard_index(coordinates)
        return tuple((s.start, s.stop - s.start) for s in index) or whole(self.shape)

    def op_sharding(self) -> bytes:
        """Returns the layout as XLA's serialized `OpSharding`."""
        return op_sharding.from_layout(self.layout)

    def assemble(self, values: Sequence[tf.Tensor]) -> tf.Tensor:
        """Returns the whole, from the values of the cores of a replica."""
        shards = dict(zip(self.shard_coordinates(), values, strict=True))
        counts = self.shards_per_dimension

        def join(coordinates: Coordinates) -> tf.Tensor:
            d = len(coordinates)
            if d == len(counts):
                return shards[coordinates]
            joined = [join((*coordinates, i)) for i in range(counts[d])]
            return joined[0] if len(joined) == 1 else tf.concat(joined, d)

        return join(())
