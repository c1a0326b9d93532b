"""Shardings and manual regions as instructions of HLO."""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from gshard_tf.compat.xla_protos import OpSharding
from gshard_tf.hlo.rewrites.editing import Editor, Instruction, resized

_MANUAL = OpSharding(type=OpSharding.MANUAL)
_REPLICATED = OpSharding(type=OpSharding.REPLICATED)


@dataclasses.dataclass(frozen=True)
class MeshAxes:
    """The axes of a mesh, and which of them come first where a rewrite has to choose.

    Attributes:
        sizes: The size of each axis, in the mesh's order.
        batch: The axes that the batch is split over.
    """

    sizes: Mapping[str, int]
    batch: Sequence[str] = ()

    @property
    def devices(self) -> int:
        """How many devices there are."""
        return int(np.prod(list(self.sizes.values())))

    def that_divide(self, size: int, without: Sequence[str] = ()) -> list[str]:
        """The axes over all of which a dimension of `size` splits into equal shards.

        Args:
            size: The dimension's.
            without: Axes that are not to be taken.
        """
        found = []
        for axis in dict.fromkeys([*self.batch, *self.sizes]):
            count = self.sizes[axis]
            if axis not in without and count > 1 and size % count == 0:
                found.append(axis)
                size //= count
        return found

    def split(self, axes: Sequence[Sequence[str]]) -> OpSharding:
        """Each dimension split over its axes; the axes of none hold copies."""
        used = [axis for those in axes for axis in those]
        if not used:
            return _REPLICATED
        names = list(self.sizes)
        unused = [name for name in names if name not in used]
        # [*mesh] -> [*axes in the order of the tensor's dimensions, *copies]
        devices = np.arange(self.devices).reshape(list(self.sizes.values()))
        devices = devices.transpose([names.index(name) for name in [*used, *unused]])
        tiles = [int(np.prod([self.sizes[axis] for axis in those])) for those in axes]
        sharding = OpSharding(
            type=OpSharding.OTHER,
            tile_assignment_dimensions=tiles,
            tile_assignment_devices=devices.reshape(-1).tolist(),
        )
        copies = devices.size // int(np.prod(tiles))
        if copies > 1:
            sharding.tile_assignment_dimensions.append(copies)
            sharding.replicate_on_last_tile_dim = True
        return sharding

    def split_dimension(
        self, axes: Sequence[str], rank: int, dimension: int
    ) -> OpSharding:
        """One dimension of `rank` split over axes."""
        return self.split([axes if d == dimension else [] for d in range(rank)])


def constrained(
    editor: Editor,
    value: Instruction,
    sharding: OpSharding,
    free_dimensions: Sequence[int] = (),
) -> Instruction:
    """`value` held on a sharding; of some dimensions the compiler still decides."""
    config = ""
    if free_dimensions:
        config = f"unspecified_dims=[{','.join(map(str, free_dimensions))}]"
    return _call(editor, "Sharding", value, value.shape, sharding, config)


def enter_manual(
    editor: Editor, value: Instruction, sharding: OpSharding, dimension: int
) -> Instruction:
    """The shard that each device has of `value`, for a region of its own.

    Args:
        editor: Where to emit it.
        value: A whole array.
        sharding: How it is split, along `dimension` alone.
        dimension: See above.
    """
    count = _shards(sharding, dimension)
    size = value.shape.dimensions[dimension]
    return _call(
        editor,
        "SPMDFullToShardShape",
        constrained(editor, value, sharding),
        resized(value.shape, dimension, size // count),
        _MANUAL,
    )


def leave_manual(
    editor: Editor, value: Instruction, sharding: OpSharding, dimension: int
) -> Instruction:
    """The whole array of which each device has a shard; the opposite of the above."""
    count = _shards(sharding, dimension)
    size = value.shape.dimensions[dimension]
    return _call(
        editor,
        "SPMDShardToFullShape",
        constrained(editor, value, _MANUAL),
        resized(value.shape, dimension, size * count),
        sharding,
    )


def whole() -> OpSharding:
    """Every device has all of it."""
    return _REPLICATED


def _shards(sharding: OpSharding, dimension: int) -> int:
    if sharding.type == OpSharding.REPLICATED:
        return 1
    return sharding.tile_assignment_dimensions[dimension]


def _call(editor, target, value, shape, sharding, config=""):
    return editor.emit(
        "custom-call",
        shape,
        [value],
        custom_call_target=target,
        sharding=sharding,
        backend_config=config.encode(),
    )
