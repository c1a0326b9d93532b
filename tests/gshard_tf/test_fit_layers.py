"""Layers with masks, losses, metrics and random numbers, as in plain Keras."""

import keras
import numpy as np
import parity
import pytest
import tensorflow as tf
from keras.src.random.seed_generator import draw_seed
from parity import assert_equal_runs

from gshard_tf.random.threefry import uniform

X, Y = parity.data(32)
WEIGHTS = np.linspace(0.1, 2.0, 32).astype("float32")
FIT = {"batch_size": 16, "epochs": 2, "verbose": 0, "shuffle": False}


def fit(model):
    return model.fit(X, Y, **FIT)


def sparse_loss():
    return keras.losses.SparseCategoricalCrossentropy(from_logits=True)


@pytest.mark.slow
def test_masks():
    tokens = np.random.default_rng(0).integers(0, 5, size=[32, 8])

    def make():
        model = keras.Sequential(
            [
                keras.layers.Input([8], dtype="int32"),
                keras.layers.Embedding(5, 4, mask_zero=True),
                keras.layers.LSTM(4, return_sequences=True),
                keras.layers.Dense(3),
            ]
        )
        # Plain Keras's Adam squares each look-up of a row: see test_tables.py.
        optimizer = keras.optimizers.SGD(0.1, momentum=0.9)
        model.compile(optimizer, sparse_loss(), weighted_metrics=["accuracy"])
        return model

    def use(model):
        return model.fit(tokens, tokens % 3, **FIT).history

    assert_equal_runs(make, use)


def test_masking_layer_with_sample_weights():
    # Tokens of zeros, more of them in later examples.
    x = np.where(np.arange(8)[:, None] * 5 < np.arange(32)[:, None, None], 0.0, X)
    x[:, 7] = X[:, 7]

    def make():
        model = keras.Sequential(
            [
                keras.layers.Input([8, 4]),
                keras.layers.Masking(),
                keras.layers.Dense(3),
                keras.layers.GlobalAveragePooling1D(),
            ]
        )
        model.compile("adam", sparse_loss(), weighted_metrics=["accuracy"])
        return model

    assert_equal_runs(make, lambda m: m.fit(x, Y, sample_weight=WEIGHTS, **FIT).history)


def test_losses_and_metrics_of_layers():
    class Watched(parity.Experts):
        def build(self, shape):
            super().build(shape)
            self.size = keras.metrics.Mean("size")
            self.steps = self.add_weight(
                shape=(), initializer="zeros", trainable=False, name="steps"
            )

        def call(self, x, training=False):
            y = super().call(x, training=training)
            self.add_loss(0.1 * tf.reduce_mean(y**2))
            self.size.update_state(tf.norm(y))
            if training:
                self.steps.assign_add(1.0)
            return y

    def make():
        model = keras.Sequential(
            [
                Watched(),
                keras.layers.Flatten(),
                keras.layers.Dense(3, kernel_regularizer="l2"),
                keras.layers.ActivityRegularization(l2=0.01),
            ]
        )
        model.compile("adam", sparse_loss(), metrics=["accuracy"])
        return model

    def use(model):
        history = model.fit(X, Y, validation_data=(X, Y), **FIT).history
        assert "size" in history and float(model.layers[0].steps.numpy()) == 4
        return history

    assert_equal_runs(make, use)


def test_dropout_of_keras():
    # Compiled, TensorFlow's generator gives other numbers than operation by
    # operation, so the peer is compiled here. (On a mesh it makes the global mask on
    # each device; `gshard_tf.random` does not.)
    def make():
        model = parity.classifier()
        model.add(keras.layers.Dropout(0.5, seed=3))
        model.add(keras.layers.GaussianNoise(0.1, seed=4))
        model.compile("adam", sparse_loss())
        return model

    def use(model):
        if tf.distribute.get_strategy() is model.distribute_strategy:
            model.jit_compile = True
        return fit(model).history

    assert_equal_runs(make, use)


def test_random_numbers_without_a_seed_of_their_own():
    # Keras's global seed generator belongs to the thread that calls fit, and batches
    # of unknown length are traced in another.
    class Noise(keras.layers.Layer):
        def call(self, x, training=False):
            return x + uniform(draw_seed(None), [tf.shape(x)[0], x.shape[1]])

    def make():
        model = parity.classifier()
        model.add(Noise())
        model.compile("adam", sparse_loss())
        # In scope and in the main thread, as Keras makes it on first use.
        draw_seed(None)
        return model

    x, y = parity.data(36)
    assert_equal_runs(make, lambda model: model.fit(x, y, **FIT).history)
