"""What the options of XLA's CPU compiler promise: barriers stay, wherever they are."""

import keras
import numpy as np
import parity
import pytest
import tensorflow as tf

from gshard_tf import export

X = np.random.default_rng(0).uniform(0, 9, size=[5, 6]).astype("float32")
W = np.linspace(-1, 1, 36, dtype="float32").reshape(6, 6)


def rounded(x):
    return tf.scan(lambda z, row: tf.floor(1.5 * z) + row, x, tf.zeros([6]))


def multiplied(x):
    def cell(z, row):
        return tf.tanh(tf.linalg.matvec(W, z, transpose_a=True) + row)

    return tf.scan(cell, x, tf.zeros([6]))


@pytest.mark.parametrize("function", [rounded, multiplied])
def test_a_barrier_in_a_small_loop_compiles(function):
    """XLA makes one kernel of a small loop, and has no code there for a barrier."""
    step = tf.function(function, autograph=False)
    got = parity.strategy_of(2).run(step, args=(tf.constant(X),))
    assert parity.relative_difference(got, function(tf.constant(X))) < 1e-5


def test_a_loaded_program_keeps_its_barriers(tmp_path):
    """Bilinear, by factors of which one has no exact inverse."""
    x = np.random.default_rng(0).normal(size=(2, 4, 6, 2)).astype("float32")
    with parity.strategy_of(2).scope():
        inputs = keras.Input(x.shape[1:])
        model = keras.Model(inputs, keras.layers.Resizing(12, 12)(inputs))
        model.compile()
    path = tmp_path / "predict.gshard"
    export.step_program(model, "predict", (x,)).save(path, [2])
    program = export.load(path)
    assert " opt-barrier(" in program.compiled.as_text()
    outputs, _ = program([x], program.put_state({}))
    expected = tf.image.resize(x, [12, 12])
    assert parity.relative_difference(outputs["output"], expected) < 1e-5
