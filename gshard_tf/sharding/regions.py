"""Regions of arrays, and copies of them that other libraries take as they are."""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

# A region of an array: (start, size) along each dimension.
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


def region_of(index: tuple[slice, ...], shape: tuple[int, ...]) -> Region:
    """The region that an index of slices selects of an array of `shape`."""
    bounds = []
    for part, size in zip(index, shape, strict=True):
        start, stop, _ = part.indices(size)
        bounds.append((start, stop - start))
    return tuple(bounds)


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
