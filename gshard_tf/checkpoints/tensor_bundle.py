"""TensorFlow's own checkpoint format: writes, merges, reads and verifies it.

The format ("tensor bundle") stores slices of a tensor as they come, with a CRC-32C of
each, and returns any other slice. `tf.train.load_checkpoint` alone reads it too.
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
from gshard_tf.checkpoints.manifest import Manifest
from gshard_tf.sharding.regions import ALIGNMENT, Region, whole

# TensorFlow reads all of a slice to return a part of it, so none is larger. Not below
# 32 MB, either: glibc keeps smaller blocks in its heap, which they fragment.
SLICE_BYTES = 1 << 26


@dataclasses.dataclass
class ArrayShard:
    """A shard of a named array.

    Attributes:
        name: The name of the array.
        shape: The shape of the whole array.
        region: The region of the shard in the array.
        value: Its values: an array, or a tensor of a type that numpy lacks.
    """

    name: str
    shape: tuple[int, ...]
    region: Region
    value: np.ndarray | tf.Tensor


def write(prefix: Path, shards: Sequence[ArrayShard]) -> None:
    """Writes shards to `PREFIX.index` and `PREFIX.data-*`.

    Raises:
        OSError: the disk is full, for example.
    """
    slices = [part for shard in shards for part in _slices(shard)]
    with tf.device("/cpu:0"):
        try:
            tf.raw_ops.SaveV2(
                prefix=str(prefix),
                tensor_names=[part.name for part in slices],
                shape_and_slices=[slice_spec(s.shape, s.region) for s in slices],
                tensors=[_tensor(part.value) for part in slices],
            )
        except tf.errors.OpError as error:
            raise _not_written(prefix, error) from error


def _slices(shard: ArrayShard) -> Iterator[ArrayShard]:
    """Yields a large shard in slices, which are views of it."""
    value = shard.value
    if tf.is_tensor(value) or value.nbytes <= SLICE_BYTES:
        yield shard
        return
    axis = next(i for i, size in enumerate(value.shape) if size > 1)
    row = value.nbytes // value.shape[axis]
    # Each begins where TensorFlow takes memory as it is.
    step = ALIGNMENT // math.gcd(ALIGNMENT, row)
    rows = max(step, SLICE_BYTES // row // step * step)
    flat, each = value.reshape(-1), value.size // value.shape[axis]
    start, size = shard.region[axis]
    for at in range(0, size, rows):
        count = min(rows, size - at)
        part = flat[at * each : (at + count) * each]
        shape = (*value.shape[:axis], count, *value.shape[axis + 1 :])
        region = list(shard.region)
        region[axis] = (start + at, count)
        yield dataclasses.replace(
            shard, region=tuple(region), value=part.reshape(shape)
        )


def _tensor(value: np.ndarray | tf.Tensor) -> tf.Tensor:
    """Returns an array as a tensor, in the same memory if it is large."""
    if tf.is_tensor(value) or value.nbytes < 1024 or value.dtype == np.bool_:
        return tf.convert_to_tensor(value)
    # DLPack takes numpy's own types only: bfloat16 goes as integers.
    bits = value.view(f"u{value.dtype.itemsize}") if value.dtype.kind == "V" else value
    tensor = tf.experimental.dlpack.from_dlpack(bits.__dlpack__())
    return tensor if bits is value else tf.bitcast(tensor, tf.as_dtype(value.dtype))


def merge(parts: Sequence[Path], prefix: Path) -> None:
    """Merges the bundles that several processes wrote into one.

    Raises:
        OSError: the disk is full, for example.
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
    """Returns the name of a process's position in its input."""
    return f"data/{process}"


def files(prefix: Path) -> list[Path]:
    """Returns the files of a bundle."""
    return sorted(Path(name) for name in glob.glob(f"{glob.escape(str(prefix))}.*"))


def read(
    prefix: Path,
    name: str,
    shape: tuple[int, ...],
    region: Region,
    dtype: tf.DType,
) -> tf.Tensor:
    """Reads a region of an array, and checks the checksum of every slice it needs.

    Raises:
        CorruptCheckpointError: when a checksum differs, or a file is missing, short or
            unreadable.
        OSError: when too many files are open, or memory is exhausted.
    """
    spec = slice_spec(shape, region)
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


def verify(folder: Path, manifest: Manifest) -> None:
    """Reads every array and position of a checkpoint, and checks the checksums.

    Raises:
        CorruptCheckpointError: when a checksum differs.
    """
    for name, array in manifest.arrays.items():
        dtype = tf.as_dtype(array.dtype)
        read(folder / "state", name, array.shape, whole(array.shape), dtype)
    if manifest.data["position"] == "iterator":
        for process in range(manifest.processes):
            read(folder / "state", position_name(process), (), (), tf.variant)


def reason(error: tf.errors.OpError) -> str:
    """Returns TensorFlow's message without the names of its nodes."""
    return re.sub(r"\{\{.*?\}\} ?| ?\[Op:\w+\]", "", error.message)


def _not_written(prefix: Path, error: tf.errors.OpError) -> OSError:
    cause = _as_os(error)
    return os_error(
        f"could not write {prefix} ({cause.strerror or cause})", cause.errno
    )


def _as_os(error: tf.errors.OpError) -> OSError:
    """Returns TensorFlow's error as one of the system, with its number if known."""
    text = reason(error)
    for number in errno.errorcode:
        # TensorFlow appends the system's message to the name of the file.
        if text.endswith(f"; {os.strerror(number)}"):
            return OSError(number, text)
    if isinstance(error, tf.errors.ResourceExhaustedError):
        return OSError(errno.ENOMEM, text)
    return OSError(text)


def slice_spec(shape: tuple[int, ...], region: Region) -> str:
    """Returns TensorFlow's text for a slice; "" for a whole array.

    `"8 4 0,2:0,4"` is the first quarter of `[8, 4]`.
    """
    if region == whole(shape):
        return ""
    sizes = " ".join(str(size) for size in shape)
    return f"{sizes} " + ":".join(f"{start},{size}" for start, size in region)
