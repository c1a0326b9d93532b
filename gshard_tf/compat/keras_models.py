"""Symbolic building of Keras models."""

from typing import Any

import keras
from keras.src import backend
from keras.src.backend.common.symbolic_scope import in_symbolic_scope

# Whether Keras is inferring shapes, in a graph that never runs.
# Relies on: `compute_output_spec` of the TensorFlow backend enters a `SymbolicScope`.
# On an upgrade, watch: that.
__all__ = ["build_symbolically", "in_symbolic_scope", "infer_outputs"]


def build_symbolically(model: keras.Model, batch: tuple[Any, Any, Any]) -> None:
    """Builds model, loss and metrics, as `fit` does before it traces a step.

    A model's own `train_step` does not.

    Relies on: `Model._symbolic_build`. On an upgrade, watch: that it still builds all
    three.

    Args:
        model: A compiled model.
        batch: `(x, y, sample_weight)` as Keras tensors.
    """
    model._symbolic_build(data_batch=batch)


def infer_outputs(model: keras.layers.Layer, x: Any) -> Any:
    """Returns the outputs of a layer for Keras tensors, as Keras tensors; builds it.

    Relies on: `keras.src.backend.compute_output_spec`, which has no public name. On an
    upgrade, watch: that it still calls a model which is not built.
    """
    return backend.compute_output_spec(model, x, training=False)
