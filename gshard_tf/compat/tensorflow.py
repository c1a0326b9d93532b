"""Eager execution from within any graph."""

import contextlib
from collections.abc import Iterator

import tensorflow as tf

# Private API: the eager mode of this thread. On an upgrade, check that `eager_mode`
# still leaves every kind of graph, also a plain `tf.Graph` (which `init_scope` does
# not), and that the graph is current again behind it.
from tensorflow.python.eager import context


@contextlib.contextmanager
def out_of_graphs() -> Iterator[None]:
    """Context in which operations run at once, whatever graph is being built.

    `tf.init_scope` alone leaves functions, and stays in a plain `tf.Graph`: the one
    that `tf.saved_model.save` builds, say.
    """
    with tf.init_scope(), context.eager_mode():
        yield
