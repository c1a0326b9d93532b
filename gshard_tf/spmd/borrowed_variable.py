"""A variable that a step uses although it is not on the step's mesh.

Keras has one seed generator for all unseeded random numbers of a process, so its state
belongs to no model and no strategy: it stays where it was made, in plain Keras or in
another strategy's scope. A step that draws from it takes the state along, and brings
it back when it is done.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf


class BorrowedVariable:
    """Takes the place of a `MeshVariable` among the captures of a step.

    Args:
        variable: The variable itself, which is small.
        to_host: From a value on the devices to an array.

    Attributes:
        variable: The variable itself.
    """

    #: It never stays on the devices.
    device_copy = None

    def __init__(self, variable: tf.Variable, to_host: Callable[[Any], np.ndarray]):
        self.variable = variable
        self._to_host = to_host
        self.shape = variable.shape
        self.dtype = variable.dtype
        self.name = variable.name
        self.path = variable.name

    def numpy(self) -> np.ndarray:
        """Its value now."""
        with tf.init_scope():
            return self.variable.numpy()

    def device_value(self, upload: Callable[[np.ndarray], Any]) -> Any:
        """Its value now, on the devices."""
        return upload(self.numpy())

    def set_device_copy(self, value: Any) -> None:
        """Assigns a step's result to the variable, at once."""
        with tf.init_scope():
            self.variable.assign(self._to_host(value))
