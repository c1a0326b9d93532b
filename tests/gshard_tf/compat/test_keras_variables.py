"""Keras variables and the TensorFlow variables behind them."""

import keras
import pytest
import tensorflow as tf

from gshard_tf.compat import keras_variables
from gshard_tf.compat.keras_variables import (
    backend_variable,
    current_initializer,
    current_variable,
    in_layer_scope,
    known_shape,
)


@pytest.fixture
def owners(monkeypatch):
    """The owner, and its shape, for each `tf.Variable` created meanwhile."""
    seen = []

    def creator(next_creator, **kwargs):
        owner = current_variable()
        seen.append((owner, None if owner is None else known_shape(owner)))
        return next_creator(**kwargs)

    with tf.variable_creator_scope(creator):
        yield seen


def test_the_variable_behind_a_keras_one():
    weight = keras.Variable([1.0])
    assert backend_variable(weight) is weight.value
    plain = tf.Variable(1.0)
    assert backend_variable(plain) is plain


def test_keras_creates_variables_where_they_are_known(owners):
    weight = keras.Variable(keras.initializers.Zeros(), shape=(2, 3))
    assert owners == [(weight, tf.TensorShape([2, 3]))]


def test_deferred_variables_too(owners):
    with keras.StatelessScope():
        weight = keras.Variable(keras.initializers.Zeros(), shape=(2,))
        assert owners == []
    # Keras creates them where the scope ends.
    assert owners == [(weight, tf.TensorShape([2]))]


def test_layers_and_optimizers(owners):
    layer = keras.layers.Dense(2)
    layer.build([None, 3])
    optimizer = keras.optimizers.Adam()
    optimizer.build(layer.trainable_variables)
    created = [*layer.variables, *optimizer.variables]
    assert {id(owner) for owner, _ in owners} == {id(v) for v in created}


def test_plain_variables_have_no_owner(owners):
    tf.Variable(1.0)

    class Layer(keras.layers.Layer):
        def build(self, shape):
            self.plain = tf.Variable(1.0)

    Layer().build([1])
    tf.random.Generator.from_seed(1)
    assert [owner for owner, _ in owners] == [None] * 3


def test_another_way_of_creating_variables_is_an_error(owners, monkeypatch):
    monkeypatch.setattr(keras_variables, "_CREATES", None)
    with pytest.raises(RuntimeError, match="must create a variable as .*Received: ker"):
        keras.Variable([1.0], name="weight")


def test_the_initializer_of_a_variable(monkeypatch):
    seen = []

    def creator(next_creator, **kwargs):
        seen.append(current_initializer())
        return next_creator(**kwargs)

    zeros = keras.initializers.Zeros()
    with tf.variable_creator_scope(creator):
        keras.Variable(zeros, shape=(2,))
        keras.Variable([1.0])
        tf.Variable(1.0)
    assert seen == [zeros, None, None]


def test_a_layer_is_built_and_called_in_its_scope():
    seen = []

    class Layer(keras.layers.Layer):
        def build(self, shape):
            seen.append(in_layer_scope())

        def call(self, x):
            seen.append(in_layer_scope())
            return x

    layer = Layer()
    layer.build([1])
    layer(tf.ones([1]))
    assert seen == [True, True] and not in_layer_scope()
