"""Random numbers without a seed: Keras's one generator, drawn from by whoever comes.

The right values are those of the same models in plain Keras, one after the other,
compiled by XLA: TensorFlow's own kernels make other numbers of the same state.
"""

import random

import keras
import numpy as np
import parity
import pytest
import tensorflow as tf

import gshard_tf
from gshard_tf import export
from gshard_tf.compat import keras_seeds as compat

X = np.random.default_rng(0).normal(size=[8, 4]).astype("float32")


class Noise(keras.layers.Layer):
    """Adds noise whenever it is called."""

    def call(self, x):
        return x + keras.random.normal(keras.ops.shape(x))


def noisy():
    model = keras.Sequential([keras.Input((4,)), Noise(), keras.layers.Dense(2)])
    model.compile("sgd", "mse", jit_compile=not tf.distribute.has_strategy())
    return model


class Late(keras.Model):
    """Draws in its own step only, so nothing has made the generator before."""

    def __init__(self):
        super().__init__()
        self.dense = keras.layers.Dense(2)

    def call(self, x):
        return self.dense(x)

    def train_step(self, data):
        x, _ = data
        noise = keras.random.normal(keras.ops.shape(x))
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(self(x + noise) ** 2)
        grads = tape.gradient(loss, self.trainable_variables)
        self.optimizer.apply(grads, self.trainable_variables)
        return {"loss": loss}


def late():
    model = Late()
    model.compile("sgd", jit_compile=not tf.distribute.has_strategy())
    return model


def start():
    keras.backend.clear_session(free_memory=False)
    keras.utils.set_random_seed(7)


def global_state():
    return compat.global_seed_state().numpy().tolist()


def train(order, make=noisy, on_mesh=True, batch_size=4):
    """Weights of each model and the generator's state, after each turn of `order`."""
    start()
    strategies, models, found = {}, {}, []
    for who in order:
        name = who[0]
        if on_mesh and name != "p" and name not in strategies:
            size = {"a": 4, "b": 2}[name]
            strategies[name] = parity.strategy_of({"data": size})
        if who not in models:
            if name in strategies:
                with strategies[name].scope():
                    models[who] = make()
            else:
                models[who] = make()
        models[who].fit(X, X[:, :2], batch_size=batch_size, shuffle=False, verbose=0)
        found.append([*(w.numpy() for w in models[who].weights), global_state()])
    return found


# "p" is plain Keras, "a" and "b" are strategies; each has a model of its own.
# Of batches of 6, the second has another shape than the first.
ORDERS = [("p a b p a b", 4), ("a p a", 6)]


@pytest.mark.broad(2)
@pytest.mark.parametrize(("order", "size"), ORDERS)
def test_the_numbers_of_plain_keras_in_any_order(order, size):
    order = order.split()
    ours = train(order, batch_size=size)
    plain = train(order, on_mesh=False, batch_size=size)
    parity.assert_close(ours, plain, 1e-5, "weights")


@pytest.mark.broad(2)
@pytest.mark.parametrize("order", ["a p", "p a"])
def test_a_generator_that_a_step_draws_from_first(order):
    order = order.split()
    ours, plain = train(order, late), train(order, late, on_mesh=False)
    parity.assert_close(ours, plain, 1e-5, "weights")


def test_a_set_seed_repeats_a_run():
    first = train(["p", "a"])
    random.random()
    assert not np.allclose(first[0][0], first[1][0])
    parity.assert_close(train(["p", "a"]), first, 0.0, "weights")


def test_set_random_seed_between_two_models():
    def use(on_mesh):
        start()
        found = []
        for _ in range(2):
            keras.utils.set_random_seed(3)
            if on_mesh:
                with parity.strategy_of({"data": 2}).scope():
                    model = noisy()
            else:
                model = noisy()
            model.fit(X, X[:, :2], verbose=0)
            found.append(model.get_weights()[0])
        return found

    ours = use(on_mesh=True)
    np.testing.assert_array_equal(ours[0], ours[1])
    parity.assert_close(ours, use(on_mesh=False), 1e-5, "weights")


def test_a_variable_that_is_no_generator_is_refused():
    stray = tf.Variable(1.0, name="stray")
    strategy = parity.strategy_of({"data": 2})
    with pytest.raises(
        ValueError, match="'stray:0', which was not made inside this Spmd"
    ):
        strategy.run(tf.function(lambda x: x * stray), args=(tf.constant(X),))


@pytest.mark.slow
def test_a_run_that_was_stopped_goes_on_with_the_same_noise(tmp_path):
    """A checkpoint has the state of the generator, wherever it was made."""

    class Stop(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            raise KeyboardInterrupt

    def run(folder, plain_first, *callbacks):
        start()
        if plain_first:
            noisy().fit(X, X[:, :2], verbose=0)
        with parity.strategy_of({"data": 2}).scope():
            model = noisy()
        saver = gshard_tf.CheckpointCallback(folder)
        fit = {"epochs": 3, "shuffle": False, "verbose": 0}
        model.fit(X, X[:, :2], callbacks=[saver, *callbacks], **fit)
        return [*model.get_weights(), global_state()]

    for plain_first in (False, True):
        whole = run(tmp_path / f"whole{plain_first}", plain_first)
        folder = tmp_path / f"parts{plain_first}"
        with pytest.raises(KeyboardInterrupt):
            run(folder, plain_first, Stop())
        resumed = run(folder, plain_first)
        parity.assert_close(resumed, whole, 0.0, "weights")


def test_a_program_to_save_names_the_generator():
    start()
    strategy = parity.strategy_of({"data": 2})
    with strategy.scope():
        model = noisy()
    with pytest.raises(ValueError, match="Keras's global seed generator.*as seed="):
        export.step_program(model, "train", (X, X[:, :2])).save("/nowhere/step.gshard")


def test_a_plan_leaves_the_generator_alone():
    start()
    noisy().fit(X, X[:, :2], verbose=0)
    before, state = global_state(), compat.global_seed_state()
    gshard_tf.plan(noisy, "cpu:2", batch=(X, X[:, :2]), cache=False)
    assert compat.global_seed_state() is state and global_state() == before


def test_where_keras_keeps_its_generator():
    """What `gshard_tf.compat.keras_seeds` relies on."""
    start()
    assert compat.global_seed_state() is None
    keras.random.normal([1])
    state = compat.global_seed_state()
    assert isinstance(state, tf.Variable) and state.shape == [2]
    before = state.numpy().tolist()
    keras.random.normal([1])
    assert compat.global_seed_state() is state and state.numpy().tolist() != before
    with compat.own_global_seed_generator():
        assert compat.global_seed_state() is None
        keras.random.normal([1])
        assert compat.global_seed_state() is not state
    assert compat.global_seed_state() is state
    compat.give_global_seed_generator([5, 6])
    assert state.numpy().tolist() == [5, 6]
    keras.utils.set_random_seed(1)
    assert compat.global_seed_state() is None
    compat.give_global_seed_generator([5, 6])
    assert global_state() == [5, 6]
