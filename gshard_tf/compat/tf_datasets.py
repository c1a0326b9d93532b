"""What the functions of a `tf.data` dataset do that TensorFlow cannot save."""

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
    """The operations in a dataset's functions that keep iterators from being saved.

    An iterator at the beginning has not come to all of them, and can be saved still.
    What lies before a cache is left out: once that is full, it is not saved.
    """
    found, todo = set(), [dataset]
    while todo:
        at = todo.pop()
        # Private API: the inputs and functions of a dataset. On an upgrade, check that
        # both are there, the functions with their graphs, and the name of a cache.
        if type(at).__name__ == "CacheDataset":
            continue
        todo += at._inputs()
        for function in at._functions():
            graph = function.function.graph.as_graph_def()
            bodies = [f.node_def for f in graph.library.function]
            for nodes in [graph.node, *bodies]:
                found |= {n.op for n in nodes if _WITH_STATE.fullmatch(n.op)}
    return sorted(found)
