"""The promises of TensorFlow that `gshard_tf.compat.tf_graphs` relies on."""

import tensorflow as tf

from gshard_tf.compat.tf_graphs import called_graphs, with_called


def test_functions_in_functions_are_seen_with_their_shapes():
    @tf.function(autograph=False)
    def inner(x):
        return tf.signal.fft(x)

    @tf.function(autograph=False)
    def function(x):
        def body(i, x):
            return i + 1, tf.cond(i > 1, lambda: inner(x), lambda: x)

        with tf.name_scope("loop"):
            return tf.while_loop(lambda i, _: i < 3, body, (0, x))[1]

    graph = function.get_concrete_function(tf.TensorSpec([2, 8], tf.complex64)).graph
    found = [
        (outer.name, op)
        for outer, op in with_called(graph.get_operations())
        if op.type == "FFT"
    ]
    assert [name for name, _ in found] == ["loop/while"]
    assert found[0][1].outputs[0].shape == [2, 8]


def test_inputs_and_outputs_are_in_the_order_of_the_call():
    @tf.function(autograph=False)
    def inner(x, y):
        return y, x

    @tf.function(autograph=False)
    def function(x, y):
        return inner(x, y)

    specs = tf.TensorSpec([2, 3]), tf.TensorSpec([4])
    graph = function.get_concrete_function(*specs).graph
    [call] = [op for op in graph.get_operations() if "Call" in op.type]
    [called] = called_graphs(call)
    assert [t.shape for t in called.inputs] == [t.shape for t in call.inputs]
    assert [t.shape for t in called.outputs] == [t.shape for t in call.outputs]
