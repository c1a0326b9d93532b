"""Operations of XLA: the promise of `compat.tf_xla`."""

import tensorflow as tf

from gshard_tf.compat import tf_xla


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
