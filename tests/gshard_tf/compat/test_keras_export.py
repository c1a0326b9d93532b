"""The promises of Keras that `gshard_tf.compat.keras_export` relies on."""

import keras
import tensorflow as tf

from gshard_tf.compat.keras_export import is_exporting


def test_keras_traces_an_export_from_within_its_package(tmp_path):
    traced = []

    class Layer(keras.layers.Layer):
        def call(self, x):
            traced.append(is_exporting())
            return x + 1.0

    inputs = keras.Input((2,))
    model = keras.Model(inputs, Layer()(inputs))
    tf.function(model).get_concrete_function(tf.TensorSpec([1, 2]))
    assert not any(traced)
    traced.clear()
    model.export(str(tmp_path), verbose=False)
    assert traced and all(traced)
    assert not is_exporting()
