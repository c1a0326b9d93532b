"""Keras's steps: the roles of variables."""

import keras
import numpy as np

from gshard_tf.spmd.keras_step import variable_roles


def test_roles_of_variables():
    model = keras.Sequential(
        [
            keras.layers.Input([4]),
            keras.layers.Dense(3, name="frozen", trainable=False),
            keras.layers.BatchNormalization(name="normal"),
            keras.layers.Dropout(0.1, name="drop"),
            keras.layers.Dense(2, name="dense"),
        ]
    )
    model.compile("sgd", "mse", metrics=["mae"])
    model.train_on_batch(np.ones([2, 4]), np.ones([2, 2]))
    roles = variable_roles(model)

    def role(variable):
        return roles[id(variable.value)]

    frozen, normal, drop, dense = model.layers
    assert {role(v) for v in dense.variables} == {"weight"}
    assert {role(v) for v in frozen.variables} == {"frozen"}
    assert [role(v) for v in (normal.gamma, normal.moving_mean)] == ["weight", "frozen"]
    assert {role(v) for v in drop.variables} == {"other"}  # the seed
    assert {role(v) for v in model.metrics_variables} == {"metric"}
    assert {role(v) for v in model.optimizer.variables} == {"optimizer"}
