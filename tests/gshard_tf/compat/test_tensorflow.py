"""The promises of TensorFlow that `gshard_tf.compat.tensorflow` relies on."""

import pytest
import tensorflow as tf

from gshard_tf.compat.tensorflow import out_of_graphs


def in_function(use):
    tf.function(use).get_concrete_function()


def in_graph(use):
    with tf.Graph().as_default():
        use()


def in_branch(use):
    tf.function(lambda x: tf.cond(x > 0, use, lambda: 0)).get_concrete_function(
        tf.constant(1)
    )


@pytest.mark.parametrize("around", [in_function, in_graph, in_branch])
def test_out_of_graphs(around):
    variable = tf.Variable(1.0)

    def use():
        graph = tf.compat.v1.get_default_graph()
        with out_of_graphs():
            assert tf.executing_eagerly()
            variable.assign_add(1.0)
            assert float(variable) == 2.0
        assert not tf.executing_eagerly()
        assert tf.compat.v1.get_default_graph() is graph
        return 0

    around(use)
    assert float(variable) == 2.0
