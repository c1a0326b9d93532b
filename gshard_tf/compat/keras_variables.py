"""Keras variables and the TensorFlow variables behind them."""

import inspect
from collections.abc import Callable

import keras
import tensorflow as tf
from keras.src.backend.common import name_scope
from keras.src.backend.tensorflow import core

# Where Keras calls `tf.Variable`, with the `keras.Variable` as `self`; and its callers.
_CREATES = core.Variable._initialize.__code__
_INITIALIZER_IS_CALLED = core.Variable._initialize_with_initializer.__code__
_INITIALIZES = ("__init__", "_deferred_initialize", "_initialize_with_initializer")


def backend_variable(variable: tf.Variable | keras.Variable) -> tf.Variable:
    """Returns the TensorFlow variable behind a Keras one; one of TensorFlow itself."""
    return variable.value if isinstance(variable, keras.Variable) else variable


def current_variable() -> keras.Variable | None:
    """Returns the Keras variable whose backend variable is being created.

    Keras passes `tf.Variable` neither its path nor itself, so the stack is searched.

    Relies on: `keras.src.backend.tensorflow.core.Variable._initialize`, which calls
    `tf.Variable`. On an upgrade, watch: that nothing else of that class does.

    Returns:
        None for a `tf.Variable` that Keras does not create: a user's own, Keras 2's,
        the counter of a `tf.train.Checkpoint`.

    Raises:
        RuntimeError: when Keras creates one by another way than is known here.
    """
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_code is _CREATES:
            return frame.f_locals["self"]
        if frame.f_code.co_name in _INITIALIZES and isinstance(
            frame.f_locals.get("self"), keras.Variable
        ):
            raise RuntimeError(
                "Keras must create a variable as the tested versions do, or its path "
                "and its axes cannot be known. Install the tested version (see "
                f"setup.py). Received: keras {keras.__version__}, which creates "
                f"{frame.f_locals['self'].name!r} elsewhere"
            )
        frame = frame.f_back
    return None


def current_initializer() -> Callable | None:
    """Returns the initializer of the Keras variable that is being created, or None.

    Relies on: `core.Variable._initialize_with_initializer`, whose argument it is. On an
    upgrade, watch: that a variable with an initializer is still created there.
    """
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_code is _INITIALIZER_IS_CALLED:
            return frame.f_locals["initializer"]
        frame = frame.f_back
    return None


def in_layer_scope() -> bool:
    """Returns whether a layer is being built or called.

    Relies on: the name scopes that layers open. On an upgrade, watch: that `build`
    still runs in one.
    """
    return bool(name_scope.current_path())


def known_shape(variable: keras.Variable) -> tf.TensorShape:
    """Returns the shape of a variable that has no value yet.

    Relies on: `_shape`, set before the initializer is called. On an upgrade, watch:
    `keras.src.backend.common.variables.Variable.__init__`.
    """
    return tf.TensorShape(variable._shape)
