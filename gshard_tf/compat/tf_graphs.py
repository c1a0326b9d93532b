"""Graphs of TensorFlow: the functions they call, their compiler, their variables."""

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import tensorflow as tf
from tensorflow.python.ops import control_flow_util

# They run what they call whenever they run, once.
_CALLS = frozenset({"PartitionedCall", "StatefulPartitionedCall"})
_CALLING = _CALLS | {
    "Case",
    "If",
    "StatelessCase",
    "StatelessIf",
    "StatelessWhile",
    "While",
}


def called_graph(operation: tf.Operation) -> Any:
    """The graph that an operation calls, with `inputs` and `outputs`.

    Returns:
        None for an operation that calls nothing, or only under a condition.
    """
    if operation.type not in _CALLS:
        return None
    [graph] = called_graphs(operation)
    return graph


def called_graphs(operation: tf.Operation) -> list[Any]:
    """The graphs of the functions that an operation calls: bodies, branches, ...

    Their `inputs` and `outputs` are in the order of the operation's own; those of a
    branch lack its condition.
    """
    if operation.type not in _CALLING:
        return []
    names: list[str] = []
    for value in operation.node_def.attr.values():
        if value.HasField("func"):
            names.append(value.func.name)
        names += [each.name for each in value.list.func]
    # Private API: a graph's functions by their names; what is public of them, the
    # `GraphDef`, has no shapes. On an upgrade, check that a function still has the
    # graph that it was traced to, and that a graph within knows those that it calls.
    functions = [operation.graph._get_function(name) for name in names]
    return [function.graph for function in functions if function is not None]


def with_called(
    operations: Iterable[tf.Operation],
) -> Iterator[tuple[tf.Operation, tf.Operation]]:
    """Operations, each with itself and with those of the functions that it calls.

    Yields:
        An operation of the list; and itself, or one within a function. The name of the
        first tells where in a model it stands.
    """
    for operation in operations:
        todo = [operation]
        while todo:
            within = todo.pop()
            yield operation, within
            for graph in called_graphs(within):
                todo += graph.get_operations()


def is_compiled_by_tensorflow(graph: Any) -> bool:
    """Returns whether TensorFlow itself will compile a graph, or one around it.

    Relies on: `control_flow_util.GraphOrParentsInXlaContext`. On an upgrade, watch:
    that a function with `jit_compile=True` still has that context.
    """
    return control_flow_util.GraphOrParentsInXlaContext(graph)


@contextlib.contextmanager
def hidden_from_outer_graphs() -> Iterator[None]:
    """Keeps the variables of a function traced inside out of the graphs around it.

    TensorFlow records every variable that a function uses in all the graphs around it,
    and touches it again when they are called.

    Relies on: `FuncGraph._watched_variables`; there is no public way to trace a
    function inside another one and keep their variables apart. On an upgrade, watch:
    `FuncGraph.watch_variable`.
    """
    graphs = []
    graph = tf.compat.v1.get_default_graph()
    while graph is not None and graph.building_function:
        graphs.append((graph._watched_variables, list(graph._watched_variables)))
        graph = graph.outer_graph
    try:
        yield
    finally:
        for watched, before in graphs:
            watched.clear()
            for variable in before:
                watched.add(variable)
