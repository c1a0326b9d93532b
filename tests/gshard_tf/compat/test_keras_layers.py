"""The layers within a layer, as Keras lists them."""

import keras

from gshard_tf.compat.keras_layers import all_sublayers, direct_sublayers


class Outer(keras.layers.Layer):
    def __init__(self):
        super().__init__()
        self.first = keras.layers.Dense(2, name="first")
        self.rest = [keras.Sequential([keras.layers.Dense(2, name="inner")], name="s")]


def names(layer):
    return [each.name for each in direct_sublayers(layer)]


def test_direct_layers_only():
    assert names(Outer()) == ["first", "s"]
    assert names(keras.layers.Dense(2)) == []


def test_the_layers_of_a_functional_model():
    x = keras.Input([4], name="x")
    model = keras.Model(x, keras.layers.Dense(2, name="y")(x))
    assert names(model) == ["x", "y"]


def test_layers_at_any_depth():
    found = [layer.name for layer in all_sublayers(Outer())]
    assert sorted(name for name in found if name in ("first", "s", "inner")) == [
        "first",
        "inner",
        "s",
    ]
