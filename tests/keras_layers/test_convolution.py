"""Images that are split by height and width: Keras's own layers, and what is sent."""

import types

import keras
import numpy as np
import parity
import pytest
import tensorflow as tf

import gshard_tf
import keras_layers

SIZE = (29, 21)
OURS = types.SimpleNamespace(
    **{
        name: getattr(keras_layers, name)
        for name in (
            "AveragePooling2D",
            "Conv2D",
            "Conv2DTranspose",
            "DepthwiseConv2D",
            "MaxPooling2D",
            "SeparableConv2D",
        )
    }
)


class _Split(keras.layers.Layer):
    def call(self, x):
        return gshard_tf.annotate(x, ("batch", "height", "width", None))


def _make(layers):
    """A network of all of them, of images that do not divide by the devices."""

    def make():
        normalization = keras.layers.BatchNormalization
        relu = keras.layers.ReLU
        model = keras.Sequential(
            [
                keras.Input([*SIZE, 3]),
                _Split(),
                layers.Conv2D(8, 5, strides=2, padding="same", use_bias=False),
                # Normalized before the activation, and after it.
                normalization(),
                relu(),
                layers.MaxPooling2D(3, strides=2, padding="same"),
                layers.Conv2DTranspose(8, 3, strides=2, activation="relu"),
                normalization(),
                layers.Conv2D(8, 3, padding="same", dilation_rate=2, groups=2),
                layers.AveragePooling2D(3, strides=1, padding="same"),
                keras.layers.ZeroPadding2D(1),
                layers.DepthwiseConv2D(3, depth_multiplier=2),
                layers.SeparableConv2D(4, 3, strides=2, padding="same"),
                layers.Conv2D(4, 3, padding="valid"),
                keras.layers.GlobalAveragePooling2D(),
                keras.layers.Dense(1),
            ]
        )
        model.compile(keras.optimizers.SGD(0.05, momentum=0.9), "mse")
        return model

    return make


def _use(model):
    x = np.random.default_rng(0).normal(size=[4, *SIZE, 3]).astype("float32")
    y = x[:, 0, 0, :1]
    return model.fit(x, y, batch_size=4, epochs=3, verbose=0).history["loss"]


def test_a_split_network_trains_as_keras_s_own():
    rules = gshard_tf.AxisRules({"batch": "data", "height": "rows", "width": "columns"})
    mesh = {"data": 2, "rows": 2, "columns": 2}
    plain = parity.run_plain(_make(keras.layers), _use)
    meshed = parity.run_on_mesh(_make(OURS), _use, mesh, rules=rules)
    parity.assert_close(meshed.result, plain.result, 1e-5, "loss")
    parity.assert_same_state(meshed.model, plain.model)
    for each in meshed.strategy.programs[-1].collectives():
        assert each.kind in ("collective-permute", "all-reduce"), each
        if each.kind == "collective-permute":  # less than half of the largest image
            assert each.bytes < 2 * 15 * 11 * 8 * 4 // 2, each


@pytest.mark.parametrize("axis", ["height", "batch"])
def test_images_whose_height_is_not_split_are_left_to_keras(axis):
    strategy = parity.strategy_of({"a": 2}, rules=gshard_tf.AxisRules({axis: "a"}))
    with strategy.scope():
        layer = OURS.Conv2D(2, 3)
        layer.build([2, 8, 8, 3])
    operations = set()

    @tf.function(autograph=False)
    def step(x):
        y = layer(x)
        operations.update(each.type for each in y.graph.get_operations())
        return y

    strategy.run(step, args=(tf.ones([2, 8, 8, 3]),))
    assert ("XlaCallModule" in operations) == (axis == "height")
