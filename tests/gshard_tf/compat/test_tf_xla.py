"""Graphs that XLA compiles: the promises of `compat.tf_xla`."""

import pytest
import tensorflow as tf

from gshard_tf.compat import tf_xla


@pytest.mark.parametrize("compiled", [True, False])
def test_whether_a_graph_is_compiled(compiled):
    answers = []

    @tf.function
    def inner(x):
        answers.append(tf_xla.is_compiled(tf.compat.v1.get_default_graph()))
        return x

    tf.function(inner, jit_compile=compiled)(tf.ones([2]))
    assert set(answers) == {compiled}


def test_a_barrier_is_in_the_program():
    @tf.function(jit_compile=True)
    def step(x, y):
        x, y = tf_xla.optimization_barrier([x, y])
        assert x.shape == (2,) and y.shape == (3,)
        return tf.reduce_sum(x) + tf.reduce_sum(y)

    x, y = tf.ones([2]), tf.ones([3])
    assert step(x, y) == 5
    text = step.experimental_get_compiler_ir(x, y)(stage="hlo")
    assert "opt-barrier" in text
