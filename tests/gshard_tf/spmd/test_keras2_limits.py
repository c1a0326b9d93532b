"""Keras 2 (`tf_keras`): saved models, loss scaling, and what takes Keras 3 alone."""

import numpy as np
import parity
import pytest
import tensorflow as tf

import gshard_tf
from gshard_tf.checkpoints.training_state import training_state
from gshard_tf.export import step_program

tf_keras = pytest.importorskip("tf_keras")

X, Y = parity.data(16)


def small(strategy=None):
    tf_keras.utils.set_random_seed(3)

    def make():
        inputs = tf_keras.Input([8, 4])
        x = tf_keras.layers.Flatten()(inputs)
        model = tf_keras.Model(inputs, tf_keras.layers.Dense(3)(x))
        loss = tf_keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(tf_keras.optimizers.Adam(1e-2), loss)
        return model

    if strategy is None:
        return make()
    with strategy.scope():
        return make()


KERAS_3_ALONE = {
    "verify": lambda model, folder: gshard_tf.verify(model, (X, Y)),
    "step_program": lambda model, folder: step_program(model, "train", (X, Y)),
    "A checkpoint": lambda model, folder: training_state(model),
    "CheckpointCallback": lambda model, folder: model.fit(
        X, Y, verbose=0, callbacks=[gshard_tf.CheckpointCallback(folder)]
    ),
    "NonFiniteGuard": lambda model, folder: model.fit(
        X, Y, verbose=0, callbacks=[gshard_tf.NonFiniteGuard()]
    ),
    "VerifyFirstStep": lambda model, folder: model.fit(
        X, Y, verbose=0, callbacks=[gshard_tf.VerifyFirstStep()]
    ),
}


@pytest.mark.parametrize("user", KERAS_3_ALONE)
def test_what_takes_keras_3_alone_refuses_a_model_of_keras_2(user, tmp_path):
    model = small(parity.strategy_of(2))
    with pytest.raises(TypeError) as refused:
        KERAS_3_ALONE[user](model, str(tmp_path))
    said = str(refused.value).replace("`", "")
    assert said.startswith(f"{user} must be given a model of Keras 3")
    assert said.endswith("Received: a tf_keras.Functional")


def test_a_model_from_outside_the_scope_is_named():
    strategy = parity.strategy_of(2)
    with pytest.raises(ValueError, match="inside the strategy's scope"):
        strategy.describe(small())


def test_a_saved_model_of_one_device_is_loaded_onto_the_mesh(tmp_path):
    """Its variables are made without a value, and restored."""
    plain = small()
    plain.fit(X, Y, batch_size=8, verbose=0)
    plain.save(str(tmp_path / "folder"))
    tf.saved_model.save(plain, str(tmp_path / "saved"))
    strategy = parity.strategy_of(2)
    with strategy.scope():
        model = tf_keras.models.load_model(str(tmp_path / "folder"))
        served = tf.saved_model.load(str(tmp_path / "saved"))
    assert all(strategy.extended.owns(v) for v in model.variables)
    for one, other in zip(model.get_weights(), plain.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)
    np.testing.assert_allclose(
        served(tf.constant(X)), plain(tf.constant(X)), rtol=1e-5, atol=1e-6
    )
    # What Keras 2 loads goes on otherwise than what it saved, on one device too.
    other = tf_keras.models.load_model(str(tmp_path / "folder"))
    fit = {"batch_size": 8, "epochs": 2, "shuffle": False, "verbose": 0}
    parity.assert_close(
        model.fit(X, Y, **fit).history, other.fit(X, Y, **fit).history, 1e-4, "history"
    )
    assert strategy.programs


def test_losses_of_float16_are_scaled():
    """Keras 2 scales them under strategies of a few classes alone."""
    assert issubclass(gshard_tf.SpmdStrategy, tf.distribute.OneDeviceStrategy)
    tf_keras.mixed_precision.set_global_policy("mixed_float16")
    try:
        model = small(parity.strategy_of(2))
    finally:
        tf_keras.mixed_precision.set_global_policy("float32")
    scaled = model.optimizer
    assert isinstance(scaled, tf_keras.mixed_precision.LossScaleOptimizer)
    scale = float(scaled.loss_scale)
    before = model.get_weights()
    huge = np.full_like(X, 6e4)
    with np.errstate(all="ignore"):
        model.train_on_batch(huge, Y)
    # Infinite gradients: the step changed nothing, and the scale is halved.
    assert float(scaled.loss_scale) == scale / 2
    for one, other in zip(model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(one, other)
    losses = model.fit(X, Y, batch_size=16, epochs=5, verbose=0).history["loss"]
    assert losses[-1] < losses[0]
