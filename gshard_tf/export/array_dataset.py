"""Arrays on disk as batches: batch `i` is a function of the data, the seed and `i`."""

from __future__ import annotations

import functools
import io
import os
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np

from gshard_tf.export.manifest import Tensor
from gshard_tf.io.atomic_files import write_file
from gshard_tf.io.paths import local_path


def write_data(folder: str | os.PathLike, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes packed data: all rows of each input of a program.

    Args:
        folder: A folder on a local or mounted disk; it is created.
        arrays: `[N, ...]` by the name of the input (`gshard_tf.export.batch_arrays`
            names the parts of a batch). Integers may be of a smaller type than the
            program's: token ids fit `uint16`.
    """
    folder = local_path(folder, "folder")
    lengths = {name: len(array) for name, array in arrays.items()}
    if not arrays or len(set(lengths.values())) > 1:
        raise ValueError(
            "`arrays` must have one row per example in every array. "
            f"Received: rows={lengths}"
        )
    for name, array in arrays.items():
        out = io.BytesIO()
        np.save(out, np.asarray(array))
        write_file(folder / f"{name}.npy", out.getvalue())


class ArrayBatches:
    """The batches of a folder that `write_data` wrote, read on demand.

    Args:
        folder: The folder.
        inputs: The inputs of the program, whose first dimension is the batch.
        shuffle: The seed of the order of rows, which differs in each epoch. None: the
            order of the file in each epoch.
        every_row: Whether rows that do not fill a last batch are an error. If False,
            they are not used.

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
                "All inputs must have the same number of rows, in the data and in a "
                "batch. "
                f"Received: rows={rows}, batch sizes={sorted(sizes)}"
            )
        self.rows = next(iter(rows.values()))
        self.size = sizes.pop()
        #: Full batches of an epoch; the remaining rows are not used.
        self.per_epoch = self.rows // self.size
        if every_row and self.rows % self.size:
            raise ValueError(
                f"The data in {folder} must be a whole number of batches. Add rows "
                "with a sample weight of 0, or save the program for another batch. "
                f"Received: {self.rows} rows, a batch of {self.size}"
            )
        if not self.per_epoch:
            raise ValueError(
                f"The data in {folder} must fill at least one batch. "
                f"Received: {self.rows} rows, a batch of {self.size}"
            )
        self._order = functools.lru_cache(maxsize=1)(self._make_order)

    def _make_order(self, seed: int, epoch: int) -> np.ndarray:
        return np.random.default_rng([seed, epoch]).permutation(self.rows)

    def __len__(self) -> int:
        return self.per_epoch

    def batch(self, number: int) -> list[np.ndarray]:
        """Returns the arrays of a batch; batches are numbered over all epochs."""
        epoch, place = divmod(number, self.per_epoch)
        rows: slice | np.ndarray = slice(place * self.size, (place + 1) * self.size)
        if self.shuffle is not None:
            # In the order of the file, which is faster to read.
            rows = np.sort(self._order(self.shuffle, epoch)[rows])
        return [
            np.asarray(array[rows], dtype=tensor.dtype)
            for tensor, array in zip(self.inputs, self.arrays, strict=True)
        ]


def _open(folder: pathlib.Path, tensor: Tensor) -> np.ndarray:
    path = folder / f"{tensor.name}.npy"
    if not path.is_file():
        names = sorted(p.stem for p in folder.glob("*.npy"))
        raise ValueError(
            f"The program has an input {tensor.name!r}, so the file {path} must exist. "
            f"Received: arrays {names}"
        )
    array = np.load(path, mmap_mode="r")
    same_kind = np.can_cast(array.dtype, np.dtype(tensor.dtype), "same_kind")
    if array.shape[1:] != tensor.shape[1:] or not same_kind:
        raise ValueError(
            f"The rows of {path} must fit the program's input, {tensor.dtype}"
            f"{list(tensor.shape[1:])}. Received: {array.dtype}{list(array.shape[1:])}"
        )
    return array
