"""The promises of TensorFlow that `gshard_tf.compat.tf_functions` relies on."""

import tensorflow as tf

from gshard_tf.compat.tf_functions import called_graph


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
