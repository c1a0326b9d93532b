"""One variable as the cores of a TPU hold it: a part, or a copy, per core."""

import functools
import itertools
import math
import weakref
from typing import Any

import numpy as np
import tensorflow as tf
from tensorflow.experimental import dtensor

# Private API: the class of `tf.Variable`'s instances; inside a strategy's scope
# `tf.Variable` would come back to the strategy.
from tensorflow.python.ops import resource_variable_ops

from gshard_tf.compat.tensorflow import out_of_graphs
from gshard_tf.sharding import op_sharding
from gshard_tf.sharding.regions import Region, whole
from gshard_tf.sharding.variable_layouts import VariableLayouts
from gshard_tf.tpu.exported_variable import stand_in
from gshard_tf.tpu.initial_value import InitialValue


class Storage:
    """The parts of one variable, made when they are first used.

    By then a layer has named the axes of its weight (`gshard_tf.name_axes` comes after
    `add_weight`), so that nothing is ever stored whole that is to be split.

    Args:
        devices: Names of the cores, `[replicas][cores of a replica]`.
        layouts: Decides how variables are split.
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
        self._owner: weakref.ref | None = None
        self._cores: list[list[Any]] | None = None

    def belongs_to(self, owner: Any) -> None:
        """Notes whose storage it is: the variable that layers and users see."""
        self._owner = weakref.ref(owner)

    @property
    def layout(self) -> dtensor.Layout:
        return self._layouts.layout_for(self._owner()).storage

    def cores(self, replica: int) -> list[Any]:
        """What each core of a replica holds, in the order of the mesh."""
        if self._cores is None:
            # In eager mode also where a SavedModel's graph is being made.
            with out_of_graphs():
                self._cores = self._make()
            self._initial = None
        return self._cores[replica]

    @functools.cached_property
    def exported_whole(self) -> Any:
        """What an exported function reads in place of the parts."""
        return stand_in(self.shape, self.dtype, self.name)

    def _make(self) -> list[list[Any]]:
        tiles = self.tiles()
        distinct = list(dict.fromkeys(tiles))
        slices = [self.slices(tile) for tile in distinct]
        made: list[list[Any]] = [[None] * len(tiles) for _ in self.devices]
        # One part after the other, so that the host holds no more than it must.
        for tile, value in zip(distinct, self._initial.parts(slices), strict=True):
            for replica, core in itertools.product(range(len(made)), range(len(tiles))):
                if tiles[core] != tile:
                    continue
                with tf.device(self.devices[replica][core]):
                    made[replica][core] = resource_variable_ops.ResourceVariable(
                        value,
                        dtype=self.dtype,
                        trainable=self.trainable,
                        name=f"{self.name}/r{replica}/core{core}",
                    )
        return made

    # -- which part is where -----------------------------------------------------

    @property
    def partitions(self) -> list[int]:
        """Into how many parts each dimension is split; one each: not split."""
        layout = self.layout
        return [layout.num_shards(d) for d in range(layout.rank)]

    @property
    def is_split(self) -> bool:
        return math.prod(self.partitions) > 1

    def tiles(self) -> list[tuple[int, ...]]:
        """For each core, which part of each dimension it holds."""
        layout = self.layout
        mesh = layout.mesh
        found = []
        for place in np.ndindex(*mesh.shape()):
            at = dict(zip(mesh.dim_names, map(int, place), strict=True))
            specs = layout.sharding_specs
            found.append(tuple(0 if s == dtensor.UNSHARDED else at[s] for s in specs))
        return found

    def slices(self, tile: tuple[int, ...]) -> tuple[slice, ...]:
        """Where a part lies in the whole; () for a whole that is not split."""
        if not self.is_split:
            return ()
        sizes = [n // p for n, p in zip(self.shape, self.partitions, strict=True)]
        return tuple(
            slice(i * n, (i + 1) * n) for i, n in zip(tile, sizes, strict=True)
        )

    def region(self, tile: tuple[int, ...]) -> Region:
        """The same as checkpoints say it, of a whole too."""
        return tuple((s.start, s.stop - s.start) for s in self.slices(tile)) or whole(
            self.shape
        )

    def sharding(self) -> bytes:
        """The same as XLA says it."""
        return op_sharding.from_layout(self.layout)

    def assemble(self, parts: list[tf.Tensor]) -> tf.Tensor:
        """The whole, from what each core holds."""
        held = dict(zip(self.tiles(), parts, strict=True))
        partitions = self.partitions

        def join(tile: tuple[int, ...]) -> tf.Tensor:
            d = len(tile)
            if d == len(partitions):
                return held[tile]
            joined = [join((*tile, i)) for i in range(partitions[d])]
            return joined[0] if len(joined) == 1 else tf.concat(joined, d)

        return join(())
