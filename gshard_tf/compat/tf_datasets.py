"""`tf.data`: handles of iterators, and operations that TensorFlow cannot save."""

import re

import tensorflow as tf

# Operations with a state that is not in the dataset: TensorFlow saves no iterator that
# has come to them. Others that there may be are refused by it when it comes to save.
_WITH_STATE = re.compile(
    "GeneratorDataset|(Eager)?PyFunc|(Dummy|Anonymous|)SeedGenerator|"
    "Random(Uniform|UniformInt|StandardNormal|Shuffle|GammaV?2?|PoissonV?2?)|"
    "TruncatedNormal|Multinomial"
)


def iterator_resource(iterator: tf.data.Iterator) -> tf.Tensor:
    """Returns the handle of an eager iterator, for the public raw operations.

    Relies on: `OwnedIterator._iterator_resource`. On an upgrade, watch:
    `SerializeIterator` and `DeserializeIterator` still take it.
    """
    return iterator._iterator_resource


def operations_with_state(dataset: tf.data.Dataset) -> list[str]:
    """Returns the operations of a dataset that keep its iterators from being saved.

    An iterator at the beginning has not come to all of them, and can be saved still.
    The inputs of a cache are left out: once that is full, they are not saved.

    Relies on: `Dataset._inputs` and `Dataset._functions`. On an upgrade, watch: the
    functions still have their graphs, and a cache the name `CacheDataset`.
    """
    operations: set[str] = set()
    todo = [dataset]
    while todo:
        at = todo.pop()
        if type(at).__name__ == "CacheDataset":
            continue
        todo += at._inputs()
        for function in at._functions():
            graph = function.function.graph.as_graph_def()
            bodies = [f.node_def for f in graph.library.function]
            for nodes in [graph.node, *bodies]:
                operations |= {n.op for n in nodes if _WITH_STATE.fullmatch(n.op)}
    return sorted(operations)
