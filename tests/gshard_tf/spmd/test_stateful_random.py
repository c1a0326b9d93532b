"""Which random operations a step may use: numbers of N devices are those of one."""

import warnings

import keras
import numpy as np
import parity
import pytest
import tensorflow as tf
from tensorflow.compiler.xla.service import hlo_pb2

import gshard_tf
from gshard_tf.spmd import lowering, stateful_random

X = np.random.default_rng(0).normal(size=[16, 8]).astype("float32")

STATEFUL = {
    "RandomUniform": lambda x: tf.random.uniform(x.shape),
    "RandomUniform dropout": lambda x: tf.nn.dropout(x, 0.5),
    "RandomUniformInt": lambda x: tf.random.uniform(x.shape, 0, 9, tf.int32),
    "RandomStandardNormal": lambda x: tf.random.normal(x.shape),
    "TruncatedNormal": lambda x: tf.random.truncated_normal(x.shape),
    "RandomShuffle": lambda x: tf.random.shuffle(x),
    "Multinomial": lambda x: tf.random.categorical(x, 3),
}
FUNCTIONS = {
    "uniform": lambda x: keras.random.uniform(x.shape, seed=3),
    "normal": lambda x: keras.random.normal(x.shape, seed=3),
    "truncated_normal": lambda x: keras.random.truncated_normal(x.shape, seed=3),
    "randint": lambda x: keras.random.randint(x.shape, 0, 99, seed=3),
    "categorical": lambda x: keras.random.categorical(x, 4, seed=3),
    "shuffle": lambda x: keras.random.shuffle(x, seed=3),
    "dropout": lambda x: keras.random.dropout(x, 0.5, seed=3),
    "stateless": lambda x: tf.random.stateless_uniform(x.shape, [1, 2]),
    "stateless_dropout": lambda x: tf.nn.experimental.stateless_dropout(x, 0.5, [1, 2]),
}


@pytest.fixture(autouse=True)
def nothing_warned_of(monkeypatch):
    monkeypatch.setattr(stateful_random, "_warned", set())


def lowered(op):
    return lowering.lower(*lowering.trace(op, [tf.TensorSpec(X.shape)]))


@pytest.mark.parametrize("name", STATEFUL)
def test_stateful_operations_are_named_once(name):
    kind = name.split()[0]
    with pytest.warns(UserWarning, match="not reproducible") as caught:
        lowered(STATEFUL[name])
    [text] = [str(w.message) for w in caught if "not reproducible" in str(w.message)]
    assert f"the operation {kind} (" in text
    # What it says to use instead exists.
    [function, *_] = text.split("Use keras.random.")[1].split(",")
    assert hasattr(keras.random, function.split(" ")[0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lowered(STATEFUL[name])


def test_operations_within_loops_and_branches_are_found():
    def step(x):
        def body(i, y):
            return i + 1, tf.cond(
                y[0, 0] > 0, lambda: y + tf.random.normal(x.shape), lambda: y
            )

        return tf.while_loop(lambda i, _: i < 3, body, (0, x))[1]

    with pytest.warns(UserWarning, match="RandomStandardNormal"):
        lowered(step)


def on_mesh(devices, op, times=1):
    strategy = parity.strategy_of({"data": devices})

    def step(x):
        return op(gshard_tf.annotate(x, ("batch", None)))

    step = tf.function(step)
    return [np.asarray(strategy.run(step, args=(X,))) for _ in range(times)]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_stateless_numbers_are_those_of_one_device(name):
    op = FUNCTIONS[name]
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*not reproducible.*")
        found = on_mesh(8, op)[0]
    np.testing.assert_allclose(found, on_mesh(1, op)[0], rtol=1e-6)
    plain = tf.function(op, jit_compile=True)(tf.constant(X))
    np.testing.assert_allclose(found, plain, rtol=1e-5)
    assert len(np.unique(found)) > 3


def test_generator_numbers_are_those_of_one_device():
    def run(devices):
        strategy = parity.strategy_of({"data": devices})
        with strategy.scope():
            generator = tf.random.Generator.from_seed(3)
        step = tf.function(lambda x: x + generator.normal(x.shape))
        return [np.asarray(strategy.run(step, args=(X,))) for _ in range(2)]

    first, second = run(8)
    assert np.any(first != second)
    parity.assert_close([first, second], run(1), 1e-6, "numbers")


def test_what_becomes_of_a_stateful_operation():
    """The promise of XLA that the search relies on: the name of the instruction."""
    with pytest.warns(UserWarning):
        module = hlo_pb2.HloModuleProto.FromString(lowered(STATEFUL["Multinomial"]).hlo)
    [(kind, name)] = stateful_random.find_stateful_random(module)
    assert kind == "Multinomial" and name
