"""Images that are split by height and width: Keras's own layers, and what is sent."""

import pathlib
import re
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


def _recipe():
    """The function of docs/partitioning.md that puts our layers in place of Keras's."""
    guide = pathlib.Path(__file__).resolve().parents[2] / "docs" / "partitioning.md"
    [source] = re.findall(
        r"^def with_halos.*?\n\n", guide.read_text("utf-8"), re.M | re.S
    )
    scope = {"keras_layers": keras_layers}
    exec(source, scope)
    return scope["with_halos"]


def _bottleneck(size):
    """A network of Keras's own layers, with a branch."""
    layers = keras.layers
    images = keras.Input([size, size, 3])
    x = layers.Conv2D(8, 7, 2)(layers.ZeroPadding2D(3)(images))
    x = layers.MaxPooling2D(3, 2)(layers.ZeroPadding2D(1)(layers.ReLU()(x)))
    x = layers.Add()(
        [layers.Conv2D(8, 1)(x), layers.DepthwiseConv2D(3, padding="same")(x)]
    )
    return keras.Model(images, layers.Dropout(0.5)(layers.GlobalAveragePooling2D()(x)))


def _resnet(size):
    return keras.applications.ResNet50(
        weights=None, input_shape=(size, size, 3), classes=4
    )


@pytest.mark.parametrize(
    ("make", "size"),
    [(_bottleneck, 37), pytest.param(_resnet, 64, marks=pytest.mark.slow)],
)
def test_a_model_of_keras_s_layers_is_converted(make, size):
    keras.utils.set_random_seed(0)
    plain = make(size)
    rules = gshard_tf.AxisRules({"height": "rows", "width": "columns"})
    strategy = parity.strategy_of({"rows": 4, "columns": 2}, rules=rules)
    with strategy.scope():
        clone = keras.models.clone_model(plain, clone_function=_recipe())
        clone.set_weights(plain.get_weights())
        images = keras.Input(plain.input_shape[1:], batch_size=2)
        model = keras.Model(images, clone(_Split()(images)))
    x = np.random.default_rng(0).normal(size=[2, size, size, 3]).astype("float32")
    expected = plain(x, training=False)
    parity.assert_close(model.predict(x, verbose=0), expected, 1e-5, "outputs")
    # The results of the pool are sums over the devices; no image is gathered.
    found = {each.kind for each in strategy.programs[-1].collectives()}
    assert found == {"collective-permute", "all-reduce"}
