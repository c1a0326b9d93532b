"""Callback of Keras 3 that refuses a model of Keras 2 with a sentence."""

import keras

from gshard_tf.compat.keras_versions import check_is_keras_3


class Keras3Callback(keras.callbacks.Callback):
    """Base of the callbacks, which Keras 2 would take and not understand."""

    def set_model(self, model: keras.Model) -> None:
        check_is_keras_3(model, type(self).__name__)
        super().set_model(model)
