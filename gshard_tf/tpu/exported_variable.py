"""A split variable in a SavedModel: there it is one variable again."""

import inspect
from typing import Any

import tensorflow as tf

# Private API: a variable that has a shape and no value, as TensorFlow's own export
# makes them.
from tensorflow.python.ops import resource_variable_ops

from gshard_tf.compat.tensorflow import out_of_graphs

# Keras traces what it exports from within this package.
_KERAS_EXPORT = "keras.src.export"


def being_exported() -> bool:
    """Whether Keras is tracing a function for a SavedModel."""
    # Nothing else tells: the trace is an ordinary one, and saving begins after it.
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_globals.get("__name__", "").startswith(_KERAS_EXPORT):
            return True
        frame = frame.f_back
    return False


def stand_in(shape: tf.TensorShape, dtype: tf.DType, name: str) -> Any:
    """The whole of a variable to be read in an exported function; it holds nothing.

    When the SavedModel is loaded, the variable that takes its place gets the value
    that was saved, part by part.
    """
    with out_of_graphs(), tf.device("CPU:0"):
        return resource_variable_ops.UninitializedVariable(
            shape=shape, dtype=dtype, name=name, trainable=False
        )
