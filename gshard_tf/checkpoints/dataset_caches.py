"""Checks the files of `dataset.cache(FILE)` that a position in the input relies on.

TensorFlow restores a position without a check that it could open them, and then the
process dies.
"""

import contextlib
import os
import re
from collections.abc import Sequence

import tensorflow as tf

from gshard_tf.checkpoints.tensor_bundle import reason
from gshard_tf.compat.tf_caches import FileCache, caches_in_state, file_caches

_WAYS_OUT = (
    "Keep the files with the run; or remove those that are left and read the "
    "position as a count, ResumableDataset(..., position='count'), which writes them "
    "anew; or cache in memory, dataset.cache()."
)


def require_caches(dataset: tf.data.Dataset, state: tf.Tensor) -> None:
    """Raises `ValueError` where an iterator over `dataset` cannot be restored.

    A state does not name the files. If it does not have each cache of the dataset once,
    it is unknown which of them it reads, and all must be whole once it reads one.

    Args:
        dataset: Batches, with any number of caches.
        state: The result of `tf.raw_ops.SerializeIterator`.

    Raises:
        ValueError: a cache that would be read is missing, is not whole, or has elements
            of other types.
    """
    read = caches_in_state(state)
    if not read:
        return
    caches = file_caches(dataset)
    if caches is None:
        raise ValueError(
            "The cache files of a dataset with more than 2 GB of tensors cannot be "
            "checked, so its position cannot be restored. Read the position as "
            "a count: ResumableDataset(..., position='count')."
        )
    if len(read) != len(caches):
        read = [any(read)] * len(caches)
    for cache, is_read in zip(caches, read, strict=True):
        if tf.io.gfile.exists(f"{cache.file}.index"):
            # Also where it was being written: TensorFlow reads existing files.
            problem = _problem(cache)
        else:
            problem = f"there is no {cache.file}.index" if is_read else None
        if problem is not None:
            raise ValueError(
                f"The files of dataset.cache({cache.file!r}) must be those of the "
                f"position, but {problem}. "
                f"{_WAYS_OUT}"
            )


def _problem(cache: FileCache) -> str | None:
    """Returns the fault in the files of a cache that was written, or None."""
    try:
        # Any dataset opens it: TensorFlow does not compare the cached elements.
        next(iter(tf.data.Dataset.range(0).cache(cache.file)), None)
    except tf.errors.InvalidArgumentError:
        pass  # It was read, and has no integers.
    except tf.errors.OpError as error:
        return f"its first element cannot be read: {reason(error)}"
    return _other_types(cache) or _missing_data(cache.file)


def _other_types(cache: FileCache) -> str | None:
    if not tf.io.gfile.glob(f"{cache.file}.index"):
        return None  # A name with "[" or the like, which RestoreV2 takes for a pattern.
    count = len(cache.dtypes)
    try:
        _read(cache.file, [cache.key(i) for i in range(count)], cache.dtypes)
    except tf.errors.OpError as error:
        return f"it is that of another dataset: {reason(error)}"
    with contextlib.suppress(tf.errors.NotFoundError):
        with contextlib.suppress(tf.errors.InvalidArgumentError):  # it has other types
            _read(cache.file, [cache.key(count)], [tf.string])
        return f"it is that of another dataset: it has more components than {count}"
    return None


def _read(file: str, keys: Sequence[str], dtypes: Sequence[tf.DType]) -> None:
    with tf.device("/cpu:0"):
        tf.raw_ops.RestoreV2(
            prefix=file,
            tensor_names=keys,
            shape_and_slices=[""] * len(keys),
            dtypes=dtypes,
        )


def _missing_data(file: str) -> str | None:
    folder, name = os.path.split(file)
    names = tf.io.gfile.listdir(folder or ".")
    pattern = re.compile(re.escape(name) + r"\.data-(\d{5})-of-(\d{5})")
    files = [match for match in map(pattern.fullmatch, names) if match]
    parts: dict[int, set[int]] = {int(match[2]): set() for match in files}
    for match in files:
        parts[int(match[2])].add(int(match[1]))
    if any(len(numbers) == count for count, numbers in parts.items()):
        return None
    return f"of its data there is only {sorted(match[0] for match in files)}"
