"""Values out of variables, piece by piece, and back into them."""

import contextlib
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import tensorflow as tf

from gshard_tf.checkpoints.manifest import Array
from gshard_tf.checkpoints.naming import Variable
from gshard_tf.checkpoints.tensor_bundle import Piece
from gshard_tf.compat.keras_variables import backend_variable
from gshard_tf.sharding.regions import Region, aligned_copies, whole
from gshard_tf.sharding.sharded_variable import ShardedVariable


def describe(state: Mapping[str, Variable]) -> dict[str, Array]:
    """Shape, type and layout of each variable."""
    found = {}
    for name, variable in state.items():
        value = backend_variable(variable)
        shape = tuple(value.shape)
        split: tuple[str | None, ...] = (None,) * len(shape)
        if isinstance(value, ShardedVariable):
            split = value.partition_spec()
        path = getattr(variable, "path", value.name)
        found[name] = Array(shape, value.dtype.name, path, split)
    return found


def snapshot(state: Mapping[str, Variable], is_chief: bool) -> list[Piece]:
    """Copies of the pieces that this process is to write.

    Args:
        state: The variables.
        is_chief: Whether this process writes what every process has: variables that
            are not on the mesh.
    """
    views, pieces = [], []
    with contextlib.ExitStack() as held:
        for name, variable in state.items():
            value = backend_variable(variable)
            shape = tuple(value.shape)
            parts = None
            if isinstance(value, ShardedVariable):
                held.enter_context(value.hold_shards())
                parts = value.addressable_shards()
            if parts is not None:
                for region, part in parts:
                    kind = pieces if tf.is_tensor(part) else views
                    kind.append(Piece(name, shape, region, part))
            elif is_chief:
                # TensorFlow copies a value that is held before it writes to it.
                tensor = tf.convert_to_tensor(value)
                pieces.append(Piece(name, shape, whole(shape), tensor))
        copies = aligned_copies([view.value for view in views])
    return pieces + [
        dataclasses.replace(view, value=copy)
        for view, copy in zip(views, copies, strict=True)
    ]


# Reads a region of the array that belongs to a variable.
Reader = Callable[[Region], tf.Tensor]


def load(variable: Variable, read: Reader) -> Callable[[], None]:
    """Brings new values to where a variable is; they become its own when called.

    So everything can be read, and found to be whole, before anything changes.
    """
    value = backend_variable(variable)
    if isinstance(value, ShardedVariable):
        return value.stage(lambda region: read(region).numpy())
    loaded: Any = read(whole(tuple(value.shape)))
    return lambda: value.assign(loaded)


def repeated(read: Reader) -> Reader:
    """A reader of an array that is repeated along a new first dimension."""

    def read_repeated(region: Region) -> tf.Tensor:
        (_, count), *rest = region
        part = read(tuple(rest))
        return tf.broadcast_to(part, [count, *part.shape])

    return read_repeated
