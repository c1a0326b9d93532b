"""Our Adafactor against Keras's, which keeps more and computes the same."""

import keras
import numpy as np
import parity
import pytest

import gshard_tf
from gshard_tf.optimizers import Adafactor
from keras_layers import MoELayer


def model(optimizer):
    keras.utils.set_random_seed(0)
    inputs = keras.Input((4, 8))
    x = inputs + MoELayer(8, 16, seed=0, name="moe")(inputs)
    built = keras.Model(inputs, keras.layers.Dense(3)(x))
    # In plain Keras, operation by operation: quicker to start.
    built.compile(optimizer, "mse", jit_compile=False)
    return built


DATA = (
    np.random.RandomState(0).normal(size=(32, 4, 8)).astype("float32"),
    np.random.RandomState(1).normal(size=(32, 4, 3)).astype("float32"),
)


@pytest.mark.parametrize("relative_step", [True, False])
def test_it_takes_the_steps_of_keras(relative_step):
    arguments = {"learning_rate": 0.05, "relative_step": relative_step}
    ours = model(Adafactor(**arguments))
    theirs = model(keras.optimizers.Adafactor(**arguments))
    for each in (ours, theirs):
        parity.build_optimizer(each)
        each.fit(*DATA, batch_size=8, epochs=2, shuffle=False, verbose=0)
    for one, other in zip(ours.get_weights(), theirs.get_weights(), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


def test_a_tables_gradient_is_summed_by_rows():
    """An embedding, whose gradient is sparse in plain Keras, is a one-hot product."""

    class OneHot(keras.layers.Embedding):
        def call(self, ids):
            return keras.ops.one_hot(ids, self.input_dim) @ self.embeddings

    ids = np.random.RandomState(2).randint(0, 6, size=(32, 4))
    weights = []
    for embedding in (keras.layers.Embedding, OneHot):
        keras.utils.set_random_seed(0)
        built = keras.Sequential(
            [
                keras.layers.Input([4], dtype="int32"),
                embedding(6, 8, name="embedding"),
                keras.layers.Dense(3),
            ]
        )
        built.compile(Adafactor(0.05), "mse", jit_compile=False)
        built.fit(ids, DATA[1], batch_size=8, shuffle=False, verbose=0)
        weights.append(built.get_weights())
    for one, other in zip(*weights, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


def test_it_keeps_factors_only_and_splits_them_as_their_weight():
    strategy = parity.strategy_of(8)
    with strategy.scope():
        built = model(Adafactor(0.05))
    built.fit(*DATA, batch_size=8, verbose=0)
    slots = built.optimizer.variables
    assert all(len(slot.shape) < 3 for slot in slots)
    large = [slot for slot in slots if "experts" in slot.name]
    assert len(large) == 4
    for slot in large:
        assert strategy.layout(slot).sharding_specs[0] != "unsharded"
    assert isinstance(strategy, gshard_tf.SpmdStrategy)


def test_it_is_saved_and_loaded(tmp_path):
    built = model(Adafactor(0.05))
    built.fit(*DATA, batch_size=8, verbose=0)
    built.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert isinstance(loaded.optimizer, Adafactor)
    for one, other in zip(
        built.optimizer.variables, loaded.optimizer.variables, strict=True
    ):
        np.testing.assert_array_equal(one, other)
