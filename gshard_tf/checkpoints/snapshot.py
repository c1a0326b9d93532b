"""Copies variable shards to the host, and stages restored ones."""

import contextlib
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import tensorflow as tf

from gshard_tf.checkpoints.manifest import Array
from gshard_tf.checkpoints.tensor_bundle import ArrayShard
from gshard_tf.checkpoints.training_state import Variable
from gshard_tf.compat.keras_variables import backend_variable
from gshard_tf.sharding.regions import Region, aligned_copies, whole
from gshard_tf.sharding.sharded_variable import ShardedMeshVariable


def describe(state: Mapping[str, Variable]) -> dict[str, Array]:
    """Returns shape, type and layout of each variable."""
    arrays = {}
    for name, variable in state.items():
        value = backend_variable(variable)
        shape = tuple(value.shape)
        split: tuple[str | None, ...] = (None,) * len(shape)
        if isinstance(value, ShardedMeshVariable):
            split = value.partition_spec()
        path = getattr(variable, "path", value.name)
        arrays[name] = Array(shape, value.dtype.name, path, split)
    return arrays


def snapshot(state: Mapping[str, Variable], is_chief: bool) -> list[ArrayShard]:
    """Returns copies of the shards that this process writes.

    Args:
        state: The variables.
        is_chief: Whether this process writes the variables that are not on the mesh,
            of which every process has the values.
    """
    views: list[ArrayShard] = []
    shards: list[ArrayShard] = []
    with contextlib.ExitStack() as stack:
        for name, variable in state.items():
            value = backend_variable(variable)
            shape = tuple(value.shape)
            addressable = None
            if isinstance(value, ShardedMeshVariable):
                stack.enter_context(value.hold_shards())
                addressable = value.addressable_shards()
            if addressable is not None:
                for region, part in addressable:
                    group = shards if tf.is_tensor(part) else views
                    group.append(ArrayShard(name, shape, region, part))
            elif is_chief:
                # TensorFlow copies a value with a reference before it writes to it.
                tensor = tf.convert_to_tensor(value)
                shards.append(ArrayShard(name, shape, whole(shape), tensor))
        copies = aligned_copies([view.value for view in views])
    return shards + [
        dataclasses.replace(view, value=copy)
        for view, copy in zip(views, copies, strict=True)
    ]


# Reads a region of the array that belongs to a variable.
Reader = Callable[[Region], tf.Tensor]


def stage(variable: Variable, read: Reader) -> Callable[[], None]:
    """Stages new values on a variable's devices; returns a function to commit them.

    So all arrays are read, and their checksums verified, before any variable changes.
    """
    value = backend_variable(variable)
    if isinstance(value, ShardedMeshVariable):
        return value.stage(lambda region: read(region).numpy())
    loaded: Any = read(whole(tuple(value.shape)))
    return lambda: value.assign(loaded)


def repeated(read: Reader) -> Reader:
    """Returns a reader of an array that is repeated along a new first dimension."""

    def read_repeated(region: Region) -> tf.Tensor:
        (_, count), *rest = region
        part = read(tuple(rest))
        return tf.broadcast_to(part, [count, *part.shape])

    return read_repeated
