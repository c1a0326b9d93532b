"""The masks that Keras attaches to tensors, and reads from them."""

import keras
import numpy as np
import tensorflow as tf

from gshard_tf.compat.keras_masks import keras_mask, set_keras_mask


def test_a_layer_attaches_its_mask_to_what_a_loss_gets():
    seen = []

    class Loss(keras.losses.Loss):
        def call(self, y_true, y_pred):
            seen.append(keras_mask(y_pred))
            return tf.reduce_mean(tf.square(y_true - y_pred), -1)

    model = keras.Sequential([keras.Input([3, 1]), keras.layers.Masking()])
    model.compile("sgd", Loss(), run_eagerly=True)
    x = np.array([[[1.0], [0.0], [2.0]]], np.float32)
    model.evaluate(x, x, verbose=0)
    np.testing.assert_array_equal(seen[-1], [[True, False, True]])
    assert keras_mask(tf.zeros([2])) is None


def test_a_loss_leaves_out_what_its_own_mask_does():
    class Loss(keras.losses.Loss):
        def call(self, y_true, y_pred):
            values = tf.identity(y_pred)
            set_keras_mask(values, tf.constant([True, False, True, False]))
            return values

    assert Loss()(tf.zeros([4]), tf.constant([1.0, 5.0, 2.0, 7.0])) == 1.5
