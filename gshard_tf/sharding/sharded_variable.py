"""What a variable knows of where it belongs, whatever holds its value."""

import contextlib
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf

from gshard_tf.sharding.partition_spec import PartitionSpec
from gshard_tf.sharding.regions import Region


class PlacedVariable:
    """A mixin for the variables of a mesh.

    Attributes:
        keras_variable: Weak reference to the `keras.Variable` that holds it, or None.
        reference: The weight that this optimizer slot belongs to, or None.
        reference_dims: Which dimensions of `reference` its own are.
        decision: Its layout and the reason for it, once decided.
    """

    keras_variable: weakref.ref | None = None
    reference: "PlacedVariable | None" = None
    reference_dims: tuple[int, ...] | None = None
    decision: Any = None

    @property
    def path(self) -> str:
        """Keras's path of the weight where it is Keras's, else TensorFlow's name.

        Keras 2 has no paths: its weights are TensorFlow's variables, `dense/kernel:0`.
        Here they are called `dense/kernel`, as Keras 3 calls them.
        """
        keras_variable = self.keras_variable and self.keras_variable()
        if keras_variable is None:
            return self.name.removesuffix(":0")
        return keras_variable.path


class InPieces(PlacedVariable):
    """A variable of which each device has its own piece, as checkpoints see it."""

    def partition_spec(self) -> PartitionSpec:
        """The mesh axis over which each dimension is stored split, or None."""
        raise NotImplementedError

    def own_pieces(self) -> list[tuple[Region, np.ndarray | tf.Tensor]] | None:
        """The pieces that this process is to write; None when the host has the whole.

        Tensors are copies. Arrays are views, which a step may write to: enter
        `pieces_held()` meanwhile.
        """
        raise NotImplementedError

    def pieces_held(self) -> contextlib.AbstractContextManager:
        """While it is entered, no step runs that would write to the pieces."""
        return contextlib.nullcontext()

    def load(self, read: Callable[[Region], np.ndarray]) -> Callable[[], None]:
        """Reads the pieces; they are the value once the result is called."""
        raise NotImplementedError
