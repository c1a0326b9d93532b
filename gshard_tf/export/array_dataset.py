"""Packed data as batches: batch `i` is a function of the data, the seed and `i`."""

from __future__ import annotations

import functools
import os
import pathlib
from collections.abc import Sequence

import numpy as np

from gshard_tf.export.manifest import Tensor
from gshard_tf.io.paths import local_path


class Batches:
    """The batches of a folder that `write_data` wrote; read as they are needed.

    Args:
        folder: The folder.
        inputs: The inputs of the program, whose first dimension is the batch.
        shuffle: The seed of the order of rows, another one in each epoch. None: as
            they are in the file, the same in each epoch.
        every_row: Whether rows that do not fill a last batch are an error, rather than
            left out.

    Raises:
        ValueError: when an array is missing, or does not fit the program.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        inputs: Sequence[Tensor],
        shuffle: int | None = None,
        every_row: bool = False,
    ):
        self.inputs = list(inputs)
        self.shuffle = shuffle
        folder = local_path(folder, "folder")
        self.arrays = [_open(folder, tensor) for tensor in inputs]
        rows = {t.name: len(a) for t, a in zip(inputs, self.arrays, strict=True)}
        sizes = {tensor.shape[0] for tensor in inputs}
        if len(set(rows.values())) != 1 or len(sizes) != 1:
            raise ValueError(
                "All inputs have as many rows, in the data and in a batch. "
                f"Received: rows={rows}, batch sizes={sorted(sizes)}"
            )
        self.rows = next(iter(rows.values()))
        self.size = sizes.pop()
        #: Whole batches of an epoch; what is left over is not used.
        self.per_epoch = self.rows // self.size
        if every_row and self.rows % self.size:
            raise ValueError(
                f"The data in {folder} are no whole number of batches. Add rows with a "
                "sample weight of 0, or save the program for another batch. "
                f"Received: {self.rows} rows, a batch of {self.size}"
            )
        if not self.per_epoch:
            raise ValueError(
                f"The data in {folder} do not fill one batch. "
                f"Received: {self.rows} rows, a batch of {self.size}"
            )
        self._order = functools.lru_cache(maxsize=1)(self._make_order)

    def _make_order(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self.shuffle, epoch]).permutation(self.rows)

    def __len__(self) -> int:
        return self.per_epoch

    def batch(self, number: int) -> list[np.ndarray]:
        """The arrays of a batch, counted over all epochs, as the program takes them."""
        epoch, place = divmod(number, self.per_epoch)
        rows = slice(place * self.size, (place + 1) * self.size)
        if self.shuffle is not None:
            # In their order in the file, which is quicker to read.
            rows = np.sort(self._order(epoch)[rows])
        return [
            np.asarray(array[rows], dtype=tensor.dtype)
            for tensor, array in zip(self.inputs, self.arrays, strict=True)
        ]


def _open(folder: pathlib.Path, tensor: Tensor) -> np.ndarray:
    path = folder / f"{tensor.name}.npy"
    if not path.is_file():
        found = sorted(p.stem for p in folder.glob("*.npy"))
        raise ValueError(
            f"The program has an input {tensor.name!r}, and there is no {path}. "
            f"Received: arrays {found}"
        )
    array = np.load(path, mmap_mode="r")
    same_kind = np.can_cast(array.dtype, np.dtype(tensor.dtype), "same_kind")
    if array.shape[1:] != tensor.shape[1:] or not same_kind:
        raise ValueError(
            f"The rows of {path} do not fit the program's input, {tensor.dtype}"
            f"{list(tensor.shape[1:])}. Received: {array.dtype}{list(array.shape[1:])}"
        )
    return array
