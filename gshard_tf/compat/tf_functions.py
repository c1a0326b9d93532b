"""The graph of a function that a graph calls, of which TensorFlow makes no secret."""

from typing import Any

import tensorflow as tf

_CALLS = ("PartitionedCall", "StatefulPartitionedCall")


def called_graph(operation: tf.Operation) -> Any:
    """The graph that an operation calls, with `inputs` and `outputs`.

    Returns:
        None for an operation that calls nothing, or only under a condition.
    """
    if operation.type not in _CALLS:
        return None
    # Private API: a graph's functions by their names. On an upgrade, check that what
    # it returns still has the `graph` that was traced, and that a call's inputs and
    # outputs are those of the graph, in their order.
    return operation.graph._get_function(operation.get_attr("f").name).graph
