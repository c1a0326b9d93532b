"""Gradient tapes: the promises of `compat.tf_gradients`."""

import tensorflow as tf

from gshard_tf.compat.tf_gradients import stop_recording


def test_no_tape_records():
    x = tf.constant(3.0)
    with tf.GradientTape() as outer, tf.GradientTape() as inner:
        outer.watch(x)
        inner.watch(x)
        with stop_recording():
            y = x * x
        z = x + y
    assert inner.gradient(z, x) == 1
    assert outer.gradient(z, x) == 1
