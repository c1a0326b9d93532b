"""Keras 3 and Keras 2 (`tf_keras`), which can stand in one process."""

from typing import Any

import keras


def check_is_keras_3(model: Any, user: str) -> None:
    """Raises `TypeError` for a model of Keras 2, which `fit` of a strategy takes.

    Args:
        model: A model.
        user: The name of what needs one of Keras 3.
    """
    if not isinstance(model, keras.Model):
        kind = f"{type(model).__module__.partition('.')[0]}.{type(model).__name__}"
        raise TypeError(
            f"{user} must be given a model of Keras 3. For one of Keras 2, or of the "
            "TF Model Garden, take `tf.train.Checkpoint` and the callbacks of "
            f"`tf_keras`. Received: a {kind}"
        )
