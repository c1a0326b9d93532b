"""Keras's steps by name, the specs of their batch, and the roles of variables."""

from typing import Any

import keras
import tensorflow as tf

from gshard_tf.compat.keras_models import build_symbolically, infer_outputs

MODES = {"train": "train_step", "evaluate": "test_step", "predict": "predict_step"}


def check_mode(mode: str) -> None:
    """Raises `ValueError` unless `mode` is one of `MODES`."""
    if mode not in MODES:
        raise ValueError(
            f"`mode` must be one of {tuple(MODES)}. Received: mode={mode!r}"
        )


def batch_specs(batch: Any) -> Any:
    """A nest of static `tf.TensorSpec` from specs, Keras tensors or arrays."""
    if batch is None:
        raise ValueError(
            "A step needs the batch that it is for: batch=(x, y), each a nest of "
            "tf.TensorSpec with the shapes of the global batch. Received: batch=None"
        )

    def spec(leaf: Any) -> tf.TensorSpec:
        if leaf is None:
            return None
        if not hasattr(leaf, "shape") or not hasattr(leaf, "dtype"):
            raise ValueError(
                "`batch` must be a nest of tf.TensorSpec, keras.KerasTensor or arrays. "
                f"Received: {leaf!r}"
            )
        shape = tf.TensorShape(leaf.shape)
        if not shape.is_fully_defined():
            raise ValueError(
                "A program is for one shape: every dimension of the batch must be "
                f"known. Received: {leaf!r}"
            )
        return tf.TensorSpec(shape, tf.as_dtype(leaf.dtype))

    return tf.nest.map_structure(spec, batch)


def complete(model: keras.Model, specs: Any, mode: str) -> None:
    """Makes all variables of a model, as the first step of `fit` would.

    Args:
        model: The model; compiled, unless it is only to predict.
        specs: Of the batch, from `batch_specs`.
        mode: One of `MODES`.

    Raises:
        ValueError: when the model is not compiled.
    """
    if mode != "predict" and not model.compiled:
        raise ValueError(
            f"mode={mode!r} needs a compiled model: call model.compile in the function "
            f"that makes it. Received: {model.name!r}, not compiled"
        )
    symbolic = tf.nest.map_structure(
        lambda spec: spec and keras.KerasTensor(spec.shape, spec.dtype.name), specs
    )
    x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(symbolic)
    if mode == "predict":
        if not model.built:
            infer_outputs(model, x)
        return
    build_symbolically(model, (x, y, sample_weight))
    # A model with a train_step of its own may have none, or several elsewhere.
    optimizer = model.optimizer
    if mode == "train" and optimizer is not None and not optimizer.built:
        optimizer.build(model.trainable_variables)


def variable_roles(model: keras.Model) -> dict[int, str]:
    """The role of each variable of a model, by the `id` of its `value`.

    "weight" (trainable), "frozen" (floating, and neither a metric's nor a seed),
    "metric" (reset by Keras at each epoch, in layers too), "optimizer", or "other".
    """
    optimizer = getattr(model, "optimizer", None)
    by_role = {
        "other": model.variables,
        "frozen": [v for v in model.non_trainable_variables if _is_frozen_weight(v)],
        "optimizer": [] if optimizer is None else optimizer.variables,
        "weight": model.trainable_variables,
        "metric": model.metrics_variables,
    }
    return {
        id(variable.value): role
        for role, variables in by_role.items()
        for variable in variables
    }


def _is_frozen_weight(variable: keras.Variable) -> bool:
    return (
        variable.dtype.startswith(("float", "bfloat"))
        and "metrics" not in variable.path
        and "seed" not in variable.path
    )
