"""Images that are split by height and width: Keras's own layers, and what is sent."""

import keras
import numpy as np
import parity

import gshard_tf
from keras_layers import Conv2D, MaxPooling2D

S = 32


class _Split(keras.layers.Layer):
    def call(self, x):
        return gshard_tf.annotate(x, ("batch", "height", "width", None))


def _make(convolution, pooling):
    def make():
        layers = [
            keras.Input([S, S, 3]),
            _Split(),
            convolution(8, 5, strides=2, padding="same", activation="relu", name="a"),
            keras.layers.BatchNormalization(),
            pooling(3, strides=2, padding="same"),
            convolution(8, 3, padding="same", dilation_rate=2, name="b"),
            convolution(4, 3, padding="valid", name="c"),  # Keras's own
            keras.layers.GlobalAveragePooling2D(),
            keras.layers.Dense(1),
        ]
        model = keras.Sequential(layers)
        model.compile(keras.optimizers.SGD(0.05, momentum=0.9), "mse")
        return model

    return make


def _use(model):
    x = np.random.default_rng(0).normal(size=[4, S, S, 3]).astype("float32")
    y = x[:, 0, 0, :1]
    return model.fit(x, y, batch_size=4, epochs=3, verbose=0).history["loss"]


def test_a_split_network_trains_as_keras_s_own():
    rules = gshard_tf.AxisRules({"batch": "data", "height": "rows", "width": "columns"})
    keras_s_own = _make(keras.layers.Conv2D, keras.layers.MaxPooling2D)
    mesh = {"data": 2, "rows": 2, "columns": 2}
    plain = parity.run_plain(keras_s_own, _use)
    meshed = parity.run_on_mesh(_make(Conv2D, MaxPooling2D), _use, mesh, rules=rules)
    parity.assert_close(meshed.result, plain.result, 1e-5, "loss")
    parity.assert_same_state(meshed.model, plain.model)
    for each in meshed.strategy.programs[-1].collectives():
        if "conv2d" in each.op_name or "/a_1/" in each.op_name:
            assert each.kind in ("collective-permute", "all-reduce")
