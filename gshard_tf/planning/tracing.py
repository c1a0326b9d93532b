"""One step of a Keras model, built without memory and traced for a mesh."""

from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf

from gshard_tf.compat.keras_names import own_names
from gshard_tf.compat.keras_seeds import own_global_seed_generator
from gshard_tf.spmd.abstract import AbstractStrategy, is_abstract, lower_abstract
from gshard_tf.spmd.keras_step import MODES, complete
from gshard_tf.spmd.lowering import LoweredStep


def trace_step(
    model: keras.Model | Callable[[], keras.Model],
    strategy: AbstractStrategy,
    specs: Any,
    mode: str,
) -> tuple[keras.Model, LoweredStep]:
    """Builds a model in the scope of `strategy`, and lowers a step of it.

    Layers have the same names each time, whatever was built before.

    Args:
        model: As in `plan`.
        strategy: One that has no variables yet.
        specs: Of the batch, from `batch_specs`.
        mode: One of `MODES`.

    Raises:
        ValueError: for a model that cannot be built this way.
    """
    graph = tf.compat.v1.get_default_graph()  # where TensorFlow keeps the scope
    try:
        with strategy.scope(), own_global_seed_generator(), own_names():
            built = _build(model)
            complete(built, specs, mode)
            step = lower_abstract(
                strategy.extended, getattr(built, MODES[mode]), (specs,)
            )
    except IndexError as error:
        if tf.compat.v1.get_default_graph() is graph:
            raise
        raise ValueError(
            "The function that creates the model must not call "
            "keras.backend.clear_session(), which removes the scope in which the model "
            "is built. Received: a function that calls it"
        ) from error
    return built, step


def _build(model: keras.Model | Callable[[], keras.Model]) -> keras.Model:
    if isinstance(model, keras.Model):
        if is_abstract(model):
            raise ValueError(
                "`model` must not be one that was built for another plan. Pass the "
                f"function that creates it. Received: {model.name!r}"
            )
        compiled = model.get_compile_config() if model.compiled else None
        try:
            built = type(model).from_config(model.get_config())
        except (NotImplementedError, TypeError) as error:
            raise ValueError(
                "`model` must be one that its configuration can create again. Pass a "
                "function that creates and compiles it instead. "
                f"Received: {model.name!r}, of which Keras reports: {error}"
            ) from error
        if compiled is not None:
            built.compile_from_config(compiled)
        return built
    if not callable(model):
        raise ValueError(
            "`model` must be a keras.Model or a function that creates one. "
            f"Received: model={model!r}"
        )
    built = model()
    if not isinstance(built, keras.Model):
        raise ValueError(
            "The function must return the keras.Model that it creates. "
            f"Received: {built!r}"
        )
    if built.variables and not is_abstract(built):
        raise ValueError(
            "The function must create the model when it is called, so that no weight "
            "is allocated. Received: a model that was created before"
        )
    return built
