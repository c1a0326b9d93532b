"""Base classes of variables that have a layout on a mesh."""

import contextlib
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import tensorflow as tf

from gshard_tf.layouts.partition_spec import PartitionSpec
from gshard_tf.sharding.regions import Region

if TYPE_CHECKING:
    import keras

    from gshard_tf.sharding.variable_layouts import LayoutDecision


class MeshVariableBase:
    """A variable that has a layout, whatever stores its value. A mixin.

    Attributes:
        keras_variable: Weak reference to the `keras.Variable` that holds it, or None.
        reference: The weight that this optimizer slot belongs to, or None.
        reference_dims: The dimensions of `reference` that its own ones are.
        decision: Its layout and the reason for it, once decided.
    """

    keras_variable: weakref.ref | None = None
    reference: "MeshVariableBase | None" = None
    reference_dims: tuple[int, ...] | None = None
    decision: "LayoutDecision | None" = None

    if TYPE_CHECKING:

        @property
        def name(self) -> str: ...

        @property
        def shape(self) -> tf.TensorShape: ...

        @property
        def dtype(self) -> tf.DType: ...

    @property
    def path(self) -> str:
        """Keras's path of the weight where it is Keras's, else TensorFlow's name.

        Keras 2 has no paths: its weights are TensorFlow's variables, `dense/kernel:0`.
        Here they are called `dense/kernel`, as Keras 3 calls them.
        """
        keras_variable = self.owner
        if keras_variable is None:
            return self.name.removesuffix(":0")
        return keras_variable.path

    @property
    def owner(self) -> "keras.Variable | None":
        """The `keras.Variable` that holds it, or None."""
        return None if self.keras_variable is None else self.keras_variable()


# Not `ShardedVariable`: Keras 2 takes a class of that name for TensorFlow's.
class ShardedMeshVariable(MeshVariableBase):
    """A variable stored as one shard per device; the interface that checkpoints use."""

    def partition_spec(self) -> PartitionSpec:
        """The mesh axis over which each dimension is stored split, or None."""
        raise NotImplementedError

    def addressable_shards(
        self,
    ) -> list[tuple[Region, np.ndarray]] | list[tuple[Region, tf.Tensor]] | None:
        """The shards that this process is to write; None: the host has the whole.

        Tensors are copies. Arrays are views, to which a step may write: enter
        `hold_shards()` meanwhile.
        """
        raise NotImplementedError

    def hold_shards(self) -> contextlib.AbstractContextManager:
        """A context in which no step runs that would write to the shards."""
        return contextlib.nullcontext()

    def stage(self, read: Callable[[Region], np.ndarray]) -> Callable[[], None]:
        """Reads new shards; returns a function that makes them the value."""
        raise NotImplementedError
