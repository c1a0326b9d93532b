"""Host arrays to shards on the devices of a mesh, and back.

jax is imported when it is first used: on a TPU VM, importing it takes the TPU's lock
away from TensorFlow.
"""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from tensorflow.experimental import dtensor

from gshard_tf.layouts.partition_spec import as_jax
from gshard_tf.runtime.devices import mesh_devices
from gshard_tf.runtime.process_group import collective_section
from gshard_tf.sharding.mesh_layout import MeshLayout
from gshard_tf.sharding.regions import Region, cut, region_of


def named_sharding(layout: MeshLayout, mesh: Any) -> Any:
    """A layout as jax's `NamedSharding` on `mesh`."""
    from jax.sharding import NamedSharding, PartitionSpec

    return NamedSharding(mesh, PartitionSpec(*as_jax(layout.spec)))


class Placement:
    """The devices of a mesh, to which it copies values, and from which it reads them.

    Args:
        mesh: The mesh.
        devices: Its jax devices in its order, where they are not those of this
            machine: compile-only ones of a topology, say. They are only compiled for.
    """

    def __init__(self, mesh: dtensor.Mesh, devices: Sequence[Any] | None = None):
        import jax

        self.mesh = mesh
        if devices is None:
            devices = mesh_devices(mesh)
        grid = np.array(devices).reshape(mesh.shape())
        self.jax_mesh = jax.sharding.Mesh(grid, tuple(mesh.dim_names))

    def put(self, value: np.ndarray, layout: MeshLayout) -> Any:
        """A copy of `value` on the devices, laid out as `layout` says."""
        import jax

        sharding = named_sharding(layout, self.jax_mesh)
        if not sharding.is_fully_addressable:
            # Every process has the value, and puts its own shards.
            return assemble(value.shape, sharding, lambda region: cut(value, region))
        with jax.enable_x64(True):
            return jax.device_put(value, sharding, may_alias=False)

    def get(self, value: Any) -> np.ndarray:
        """The whole of a value on the devices, as an array of its own."""
        if not value.is_fully_addressable and not value.is_fully_replicated:
            value = self._gathered(value)
        # A copy: on CPU devices a plain view would share memory with a buffer that
        # the next step is going to reuse.
        return np.array(value, copy=True)

    @functools.cached_property
    def _gather(self) -> Any:
        """A function that copies all of a value to every device.

        All processes must call it.
        """
        import jax
        from jax.sharding import NamedSharding, PartitionSpec

        whole = NamedSharding(self.jax_mesh, PartitionSpec())
        return jax.jit(lambda value: value, out_shardings=whole)

    def _gathered(self, value: Any) -> Any:
        import jax

        with collective_section("reading a split variable"), jax.enable_x64(True):
            return jax.block_until_ready(self._gather(value))


def addressable_shards(value: Any) -> Iterator[tuple[Region, np.ndarray]]:
    """The shards of a `jax.Array` that this process is to write, without a copy.

    Of a shard that several devices hold, one device's is taken, so that over all
    processes every shard comes exactly once.
    """
    for shard in value.addressable_shards:
        if shard.replica_id == 0:
            yield region_of(shard.index, value.shape), np.asarray(shard.data)


# Host memory that shards may hold before it is collected.
_COLLECT_BYTES = 1 << 23


def _own_copy(part: np.ndarray, device: Any) -> Any:
    """A copy of an array on a device, in memory that a step may write to."""
    import jax

    value = jax.device_put(part, device, may_alias=False)
    if device.platform == "cpu":
        # What is aligned jax takes as it is all the same, and holds on to it.
        if value.unsafe_buffer_pointer() == part.__array_interface__["data"][0]:
            return value.copy()
    return value


def assemble(
    shape: tuple[int, ...],
    sharding: Any,
    read: Callable[[Region], np.ndarray],
) -> Any:
    """A `jax.Array` whose shards on this process's devices come from `read`.

    Args:
        shape: Of the whole array.
        sharding: A `jax.sharding.Sharding`.
        read: Returns the values of a region; called once for each region.
    """
    import jax

    shards = place(shape, sharding.addressable_devices_indices_map(shape), read)
    with jax.enable_x64(True):
        return jax.make_array_from_single_device_arrays(shape, sharding, shards)


def place(
    shape: tuple[int, ...],
    indices: Mapping[Any, tuple[slice, ...]],
    read: Callable[[Region], np.ndarray],
) -> list[Any]:
    """Shards on devices, each a `jax.Array` of its own.

    Args:
        shape: Of the whole array.
        indices: The slices of the whole that each device holds.
        read: Returns the values of a region; called once for each region.
    """
    import jax

    holders: dict[Region, list[Any]] = {}
    for device, index in indices.items():
        holders.setdefault(region_of(index, shape), []).append(device)
    placed, uncollected = [], 0
    with jax.enable_x64(True):
        for region, devices in holders.items():
            part = read(region)
            uncollected += part.nbytes
            # Once it is there, `part` may go: the host has one that is large at most.
            placed += jax.block_until_ready(
                [_own_copy(part, device) for device in devices]
            )
            # jax lets go of what it was given when Python next collects garbage. That
            # takes milliseconds, too many for each of a thousand small arrays.
            if uncollected > _COLLECT_BYTES:
                del part
                gc.collect(0)
                uncollected = 0
    return placed
