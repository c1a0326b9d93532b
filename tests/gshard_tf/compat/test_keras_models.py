"""Symbolic building of Keras models."""

import keras

from gshard_tf.compat.keras_models import (
    build_symbolically,
    in_symbolic_scope,
    infer_outputs,
)


def test_model_loss_and_metrics_are_built():
    model = keras.Sequential([keras.layers.Dense(2)])
    model.compile("sgd", "mse", metrics=["mae"])
    x, y = keras.KerasTensor([4, 3]), keras.KerasTensor([4, 2])
    build_symbolically(model, (x, y, None))
    assert model.built
    assert {v.path.split("/")[-1] for v in model.metrics_variables} >= {"total"}
    assert len(model.metrics_variables) == 4  # the loss, and the metric


def test_inferring_outputs_builds_a_model():
    model = keras.Sequential([keras.layers.Dense(2)])
    assert infer_outputs(model, keras.KerasTensor([4, 3])).shape == (4, 2)
    assert model.built and len(model.weights) == 2


def test_inferring_shapes_is_known():
    seen = []

    class Layer(keras.layers.Layer):
        def call(self, x):
            seen.append(in_symbolic_scope())
            return x

    layer = Layer()
    infer_outputs(layer, keras.KerasTensor([1]))
    layer(keras.ops.ones([1]))
    assert seen == [True, False]
