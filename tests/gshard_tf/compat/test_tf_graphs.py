"""The promises of TensorFlow that `gshard_tf.compat.tf_graphs` relies on."""

import tensorflow as tf

from gshard_tf.compat.tf_graphs import (
    called_graph,
    called_graphs,
    hidden_from_outer_graphs,
    is_compiled_by_tensorflow,
    with_called,
)


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


def test_a_call_has_the_inputs_and_outputs_of_its_graph():
    variable = tf.Variable(2.0)
    inner = tf.function(lambda a, b: (a - b, a * variable))
    plus = tf.function(lambda a: a + 1.0)

    def outer(a, b):
        first, second = inner(b, a)
        return plus(first), second

    function = tf.function(outer).get_concrete_function(
        *[tf.TensorSpec([3], name=name) for name in "ab"]
    )
    calls = [op for op in function.graph.get_operations() if called_graph(op)]
    assert [op.type for op in calls] == ["StatefulPartitionedCall", "PartitionedCall"]
    first, second = (called_graph(op) for op in calls)
    assert [t.name for t in calls[0].inputs][:2] == ["b:0", "a:0"]
    assert len(calls[0].inputs) == len(first.inputs) == 3  # and the variable
    assert len(calls[0].outputs) == len(first.outputs) == 2
    subtraction, product = (t.op.inputs[0].op.type for t in first.outputs)
    assert (subtraction, product) == ("Sub", "Mul")
    assert second.outputs[0].op.inputs[0].op.type == "AddV2"
    assert called_graph(second.outputs[0].op) is None


def test_branches_and_loops_are_no_calls():
    def step(x):
        x = tf.cond(x > 0, lambda: x, lambda: -x)
        return tf.while_loop(lambda y: y < 9, lambda y: [y + 1], [x])[0]

    function = tf.function(step).get_concrete_function(tf.TensorSpec([], tf.int32))
    kinds = [op.type for op in function.graph.get_operations()]
    assert {"StatelessIf", "StatelessWhile"} <= {*kinds}
    assert not any(called_graph(op) for op in function.graph.get_operations())


def test_variables_are_hidden_from_the_graphs_around_them():
    variable = tf.Variable(1.0)

    @tf.function(autograph=False)
    def inner():
        return variable + 1.0

    def watched(context):
        @tf.function(autograph=False)
        def outer():
            with context():
                inner.get_concrete_function()
            return tf.constant(0.0)

        return list(outer.get_concrete_function().graph.variables)

    inner.get_concrete_function()
    assert watched(hidden_from_outer_graphs) == []


def test_a_graph_that_tensorflow_compiles():
    seen = []

    def step():
        seen.append(is_compiled_by_tensorflow(tf.compat.v1.get_default_graph()))
        return tf.constant(0.0)

    for jit_compile in (True, False):
        tf.function(step, jit_compile=jit_compile).get_concrete_function()
    assert seen == [True, False]
