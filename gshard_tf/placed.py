"""What a variable knows of where it belongs, whatever holds its value."""

import weakref
from typing import Any


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
        """Keras's path of the weight where it is Keras's, else TensorFlow's name."""
        keras_variable = self.keras_variable and self.keras_variable()
        return self.name if keras_variable is None else keras_variable.path
