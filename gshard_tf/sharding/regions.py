"""The pieces of an array that is split over devices: out of it, and into a new one."""

import gc
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from tensorflow.experimental import dtensor

# A piece of an array: (start, size) along each dimension.
Region = tuple[tuple[int, int], ...]

# An allocation at a multiple of this is taken by TensorFlow and by XLA as it is;
# another one would be copied.
ALIGNMENT = 64
_CHUNK = 1 << 25


def whole(shape: tuple[int, ...]) -> Region:
    """The region that is all of an array."""
    return tuple((0, size) for size in shape)


def cut(value: np.ndarray, region: Region) -> np.ndarray:
    """A view of a region of an array."""
    return value[tuple(slice(start, start + size) for start, size in region)]


def aligned_copies(values: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Copies that other libraries can use without copying them again.

    Made by several threads: training waits for it.
    """
    copies, tasks = [], []
    for value in values:
        buffer = np.empty(value.nbytes + ALIGNMENT, np.uint8)
        start = -buffer.ctypes.data % ALIGNMENT
        target = buffer[start : start + value.nbytes]
        source = np.ascontiguousarray(value).reshape(-1).view(np.uint8)
        copies.append(target.view(value.dtype).reshape(value.shape))
        for at in range(0, value.nbytes, _CHUNK):
            tasks.append((target[at : at + _CHUNK], source[at : at + _CHUNK]))
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
        # numpy lets other threads run while it copies bytes.
        list(threads.map(lambda task: np.copyto(*task), tasks))
    return copies


def own_pieces(value: Any) -> Iterator[tuple[Region, np.ndarray]]:
    """The pieces of a `jax.Array` that this process is to write, without a copy.

    Of pieces that several devices hold, one device's is taken, so that over all
    processes every piece comes exactly once.
    """
    for shard in value.addressable_shards:
        if shard.replica_id == 0:
            yield _region(shard.index, value.shape), np.asarray(shard.data)


def assemble(
    shape: tuple[int, ...],
    sharding: Any,
    read: Callable[[Region], np.ndarray],
) -> Any:
    """A `jax.Array` whose pieces on this process's devices come from `read`.

    Args:
        shape: Of the whole array.
        sharding: A `jax.sharding.Sharding`.
        read: Returns the values of a region; called once for each region.
    """
    import jax

    holders: dict[Region, list[Any]] = {}
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        holders.setdefault(_region(index, shape), []).append(device)

    def place(part: np.ndarray, devices: list[Any]) -> list[Any]:
        # Once it is there, `part` may go: the host never has more than one.
        return jax.block_until_ready(
            [jax.device_put(part, device, may_alias=False) for device in devices]
        )

    placed = []
    with jax.enable_x64(True):
        for region, devices in holders.items():
            placed += place(read(region), devices)
            # jax lets go of what it was given when Python next collects garbage.
            gc.collect(0)
        return jax.make_array_from_single_device_arrays(shape, sharding, placed)


def splits(layout: dtensor.Layout) -> list[str | None]:
    """The mesh axis that each dimension is split over, for people to read."""
    return [None if s == dtensor.UNSHARDED else s for s in layout.sharding_specs]


def _region(index: tuple[slice, ...], shape: tuple[int, ...]) -> Region:
    found = []
    for part, size in zip(index, shape, strict=True):
        start, stop, _ = part.indices(size)
        found.append((start, stop - start))
    return tuple(found)
