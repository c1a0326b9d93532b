"""`dataset.cache(FILE)` in a dataset, in a saved position, and in its files."""

import dataclasses
import math
import re

import tensorflow as tf

# Relies on: private formats of TensorFlow's cache_dataset_ops.cc. On an upgrade, watch:
# the state of an iterator still names its entries in plain text, by the path from the
# last dataset to the first with the number of an input in brackets; a cache which is
# being written still saves more than its `cur_index`, and one that is being read does
# not; and a cache still is a checkpoint with these keys.
_CACHE_IN_STATE = re.compile(rb"([\w:\[\]]+)::FileCacheImpl@@cur_index(@@)?")

# The entries of a state that are copied at a time: it may hold a large shuffle buffer.
_ENTRIES = 256


@dataclasses.dataclass(frozen=True)
class FileCache:
    """A `dataset.cache(FILE)`.

    Attributes:
        file: FILE, the prefix of its files' names.
        dtypes: The types of the components of an element.
    """

    file: str
    dtypes: tuple[tf.DType, ...]

    def key(self, component: int) -> str:
        """Returns the name of a component of the first element in the files."""
        width = len(str(len(self.dtypes) - 1))
        return f"{0:7d}_{component:{width}d}"


def file_caches(dataset: tf.data.Dataset) -> list[FileCache] | None:
    """Returns the caches in files of a dataset, those of first inputs first.

    Those that a function of the dataset makes for itself are not among them;
    TensorFlow saves no position in such a dataset.

    Returns:
        The caches; None for a dataset of more than 2 GB, which has no graph.
    """
    graph = tf.compat.v1.GraphDef.FromString(
        tf.raw_ops.DatasetToGraphV2(
            input_dataset=tf.data.experimental.to_variant(dataset),
            external_state_policy=1,  # it is not run: ignore it
        ).numpy()
    )
    if not graph.node:
        return None
    nodes = {node.name: node for node in graph.node}
    caches = []
    for node in graph.node:
        if node.op in ("CacheDataset", "CacheDatasetV2"):
            [file] = nodes[node.input[1]].attr["value"].tensor.string_val
            if file:  # else it is in memory
                dtypes = node.attr["output_types"].list.type
                caches.append(FileCache(file.decode(), tuple(map(tf.as_dtype, dtypes))))
    return caches


def caches_in_state(state: tf.Tensor) -> list[bool]:
    """Returns, for each cache in a saved position, whether it is being read.

    They are in the order of `file_caches`. Those of datasets that were not begun may be
    missing, and those that several datasets share occur several times.

    Args:
        state: The result of `tf.raw_ops.SerializeIterator`, `[entries]`.
    """
    matches = [
        match
        for first in range(0, state.shape[0], _ENTRIES)
        for match in _CACHE_IN_STATE.finditer(
            tf.io.serialize_tensor(state[first : first + _ENTRIES]).numpy()
        )
    ]

    def inputs_first(match: re.Match) -> tuple[list[float], int]:
        turns = [int(number) for number in re.findall(rb"\[(\d+)\]", match[1])]
        return [*turns, math.inf], -len(match[1])

    matches.sort(key=inputs_first)
    return [match[2] is None for match in matches]
