"""Pieces of named arrays in TensorFlow's own checkpoint format, and back.

The format ("tensor bundle") stores slices of a tensor as they come, with a CRC-32C of
each, and gives any other slice back. `tf.train.load_checkpoint` reads it too, with
no help of ours.
"""

import dataclasses
import errno
import glob
import math
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import tensorflow as tf

from gshard_tf.checkpoints.errors import os_error, unreadable
from gshard_tf.sharding.regions import ALIGNMENT, Region, whole

#: Whoever reads a part of a slice holds all of it meanwhile, so none is larger. Not
#: below 32 MB, either: glibc keeps smaller blocks in its heap, in pieces.
SLICE_BYTES = 1 << 26


@dataclasses.dataclass
class Piece:
    """A part of an array.

    Attributes:
        name: The array's.
        shape: The whole array's.
        region: Which part.
        value: Its values: an array, or a tensor that numpy does not know.
    """

    name: str
    shape: tuple[int, ...]
    region: Region
    value: np.ndarray | tf.Tensor


def write(prefix: Path, pieces: Sequence[Piece]) -> None:
    """Writes pieces to `PREFIX.index` and `PREFIX.data-*`.

    Raises:
        OSError: the disk is full, or the like.
    """
    pieces = [part for piece in pieces for part in _slices(piece)]
    with tf.device("/cpu:0"):
        try:
            tf.raw_ops.SaveV2(
                prefix=str(prefix),
                tensor_names=[piece.name for piece in pieces],
                shape_and_slices=[_slice_spec(p.shape, p.region) for p in pieces],
                tensors=[_tensor(piece.value) for piece in pieces],
            )
        except tf.errors.OpError as error:
            raise _not_written(prefix, error) from error


def _slices(piece: Piece) -> Iterator[Piece]:
    """A large array in slices, which are views of it."""
    value = piece.value
    if tf.is_tensor(value) or value.nbytes <= SLICE_BYTES:
        yield piece
        return
    axis = next(i for i, size in enumerate(value.shape) if size > 1)
    row = value.nbytes // value.shape[axis]
    # Each begins where TensorFlow takes memory as it is.
    step = ALIGNMENT // math.gcd(ALIGNMENT, row)
    rows = max(step, SLICE_BYTES // row // step * step)
    flat, each = value.reshape(-1), value.size // value.shape[axis]
    start, size = piece.region[axis]
    for at in range(0, size, rows):
        count = min(rows, size - at)
        part = flat[at * each : (at + count) * each]
        shape = (*value.shape[:axis], count, *value.shape[axis + 1 :])
        region = list(piece.region)
        region[axis] = (start + at, count)
        yield dataclasses.replace(
            piece, region=tuple(region), value=part.reshape(shape)
        )


def _tensor(value: np.ndarray | tf.Tensor) -> tf.Tensor:
    """An array as a tensor, in the same memory if it is large."""
    if tf.is_tensor(value) or value.nbytes < 1024 or value.dtype == np.bool_:
        return tf.convert_to_tensor(value)
    # numpy hands over numbers of its own kinds only: bfloat16 goes as integers.
    bits = value.view(f"u{value.dtype.itemsize}") if value.dtype.kind == "V" else value
    tensor = tf.experimental.dlpack.from_dlpack(bits.__dlpack__())
    return tensor if bits is value else tf.bitcast(tensor, tf.as_dtype(value.dtype))


def merge(parts: Sequence[Path], prefix: Path) -> None:
    """Makes one bundle of those that several processes wrote.

    Raises:
        OSError: the disk is full, or the like.
    """
    with tf.device("/cpu:0"):
        try:
            tf.raw_ops.MergeV2Checkpoints(
                checkpoint_prefixes=[str(part) for part in parts],
                destination_prefix=str(prefix),
                delete_old_dirs=False,
            )
        except tf.errors.OpError as error:
            raise _not_written(prefix, error) from error


def position_name(process: int) -> str:
    """The name under which a process's position in its input is kept."""
    return f"data/{process}"


def files(prefix: Path) -> list[Path]:
    """The files of a bundle."""
    return sorted(Path(name) for name in glob.glob(f"{glob.escape(str(prefix))}.*"))


def read(
    prefix: Path,
    name: str,
    shape: tuple[int, ...],
    region: Region,
    dtype: tf.DType,
) -> tf.Tensor:
    """Reads a region of an array, checking the checksum of every piece it needs.

    Raises:
        CorruptCheckpointError: when they do not match, or a file is missing, short or
            unreadable.
        OSError: when too many files are open, or memory is used up.
    """
    spec = "" if region == whole(shape) else _slice_spec(shape, region)
    with tf.device("/cpu:0"):
        try:
            [value] = tf.raw_ops.RestoreV2(
                prefix=str(prefix),
                tensor_names=[name],
                shape_and_slices=[spec],
                dtypes=[dtype],
            )
        except tf.errors.OpError as error:
            raise unreadable(str(prefix.parent), repr(name), _as_os(error)) from error
    return value


def reason(error: tf.errors.OpError) -> str:
    """TensorFlow's message without the names of its nodes."""
    return re.sub(r"\{\{.*?\}\} ?| ?\[Op:\w+\]", "", error.message)


def _not_written(prefix: Path, error: tf.errors.OpError) -> OSError:
    found = _as_os(error)
    return os_error(
        f"could not write {prefix} ({found.strerror or found})", found.errno
    )


def _as_os(error: tf.errors.OpError) -> OSError:
    """TensorFlow's error as one of the system, with its number where it has one."""
    said = reason(error)
    for number in errno.errorcode:
        # TensorFlow hands on what the system says, behind the name of the file.
        if said.endswith(f"; {os.strerror(number)}"):
            return OSError(number, said)
    if isinstance(error, tf.errors.ResourceExhaustedError):
        return OSError(errno.ENOMEM, said)
    return OSError(said)


def _slice_spec(shape: tuple[int, ...], region: Region) -> str:
    """TensorFlow's text for a slice: `"8 4 0,2:0,4"` is the first quarter of [8, 4]."""
    if region == whole(shape):
        return ""
    sizes = " ".join(str(size) for size in shape)
    return f"{sizes} " + ":".join(f"{start},{size}" for start, size in region)
