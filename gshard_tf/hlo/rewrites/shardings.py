"""Shardings and manual regions as HLO instructions."""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from gshard_tf.compat.xla_protos import OpSharding
from gshard_tf.hlo.rewrites.editing import Editor, Instruction, Shape, resized

_MANUAL = OpSharding(type=OpSharding.MANUAL)
_REPLICATED = OpSharding(type=OpSharding.REPLICATED)


@dataclasses.dataclass(frozen=True)
class MeshAxes:
    """The axes of a mesh, with those that a rewrite takes first.

    Attributes:
        sizes: The size of each axis, in the mesh's order.
        batch: The axes that the batch is split over.
    """

    sizes: Mapping[str, int]
    batch: Sequence[str] = ()

    @property
    def devices(self) -> int:
        """The number of devices."""
        return int(np.prod(list(self.sizes.values())))

    def dividing(self, size: int, exclude: Sequence[str] = ()) -> list[str]:
        """Returns axes over all of which a dimension splits into equal shards.

        Args:
            size: The size of the dimension.
            exclude: Axes that must not be taken.
        """
        axes = []
        for axis in dict.fromkeys([*self.batch, *self.sizes]):
            count = self.sizes[axis]
            if axis not in exclude and count > 1 and size % count == 0:
                axes.append(axis)
                size //= count
        return axes

    def split(self, axes: Sequence[Sequence[str]]) -> OpSharding:
        """Returns the sharding of dimensions over axes; other axes hold replicas."""
        used = [axis for group in axes for axis in group]
        if not used:
            return _REPLICATED
        names = list(self.sizes)
        unused = [name for name in names if name not in used]
        # [*mesh] -> [*axes in the order of the tensor's dimensions, *copies]
        devices = np.arange(self.devices).reshape(list(self.sizes.values()))
        devices = devices.transpose([names.index(name) for name in [*used, *unused]])
        tiles = [int(np.prod([self.sizes[axis] for axis in group])) for group in axes]
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
        """Returns the sharding of one dimension of `rank` over axes."""
        return self.split([axes if d == dimension else [] for d in range(rank)])


def with_sharding(
    editor: Editor,
    value: Instruction,
    sharding: OpSharding,
    free_dimensions: Sequence[int] = (),
) -> Instruction:
    """Returns `value` with a sharding; the compiler decides on free dimensions."""
    config = ""
    if free_dimensions:
        config = f"unspecified_dims=[{','.join(map(str, free_dimensions))}]"
    return _call(editor, "Sharding", value, value.shape, sharding, config)


def enter_manual(
    editor: Editor, value: Instruction, sharding: OpSharding, dimension: int
) -> Instruction:
    """Returns the shard that each device has of `value`, for a manual region.

    Args:
        editor: The editor to emit with.
        value: A global array.
        sharding: Its sharding, which splits `dimension` alone.
        dimension: The dimension.
    """
    count = _shards(sharding, dimension)
    size = value.shape.dimensions[dimension]
    return _call(
        editor,
        "SPMDFullToShardShape",
        with_sharding(editor, value, sharding),
        resized(value.shape, dimension, size // count),
        _MANUAL,
    )


def leave_manual(
    editor: Editor, value: Instruction, sharding: OpSharding, dimension: int
) -> Instruction:
    """Returns the global array of the devices' shards; undoes `enter_manual`."""
    count = _shards(sharding, dimension)
    size = value.shape.dimensions[dimension]
    return _call(
        editor,
        "SPMDShardToFullShape",
        with_sharding(editor, value, _MANUAL),
        resized(value.shape, dimension, size * count),
        sharding,
    )


def replicated() -> OpSharding:
    """Returns the sharding of an array that every device holds whole."""
    return _REPLICATED


def _shards(sharding: OpSharding, dimension: int) -> int:
    if sharding.type == OpSharding.REPLICATED:
        return 1
    return sharding.tile_assignment_dimensions[dimension]


def _call(
    editor: Editor,
    target: str,
    value: Instruction,
    shape: Shape,
    sharding: OpSharding,
    config: str = "",
) -> Instruction:
    return editor.emit(
        "custom-call",
        shape,
        [value],
        custom_call_target=target,
        sharding=sharding,
        backend_config=config.encode(),
    )
