"""What is relied on of TensorFlow's executors."""

import threading

import numpy as np
import pytest
import tensorflow as tf

from gshard_tf.compat.tf_executors import in_background


def test_a_call_returns_before_it_has_run_and_an_error_is_its_own():
    gate = threading.Event()

    def wait(x):
        assert gate.wait(20)
        if x < 0:
            raise ValueError("negative")
        return np.sqrt(x)

    root = tf.function(lambda x: tf.numpy_function(wait, [x], tf.float32))
    numbers = [tf.constant(x) for x in (4.0, -1.0, 9.0)]
    with in_background():
        first = root(numbers[0])
    gate.set()
    assert float(first + 1.0) == 3.0
    with in_background():
        second = root(numbers[1])
    with pytest.raises(tf.errors.InvalidArgumentError, match="negative"):
        second.numpy()
    with in_background():
        third = root(numbers[2])
    assert third.numpy() == 3.0 and float(tf.constant(1.0)) == 1.0
