"""Metrics of layers: in which graphs they count, and which names logs give them.

Keras adds the results of a layer's metrics to the logs, but calls `update_state` for
compiled metrics only. When a layer updates its own metric in `call`, every graph of the
layer assigns variables, also one that is frozen, exported or made for `predict`; and
results of two layers of one name overwrite each other. So:

* A layer in training, or called eagerly, counts at once. In a graph of inference the
  counts wait, and are assigned when the metric's result is asked for in that graph, as
  `evaluate` does in each step. Nobody asks in other graphs, which assign nothing.
* Metrics that count in one step under one name get a qualifier from their layers'
  paths.
"""

import contextlib
import threading
import warnings
import weakref
from collections.abc import Iterator
from typing import Any

import keras
import tensorflow as tf


class _Local(threading.local):
    """Of each thread: TensorFlow traces the replicas of a step in threads."""

    def __init__(self):
        self.at_once = False
        # Metric -> the graph, and the arguments of `update_state` that wait in it: of
        # the last graph only, which this keeps alive.
        self.waiting = weakref.WeakKeyDictionary()
        # Graph -> name -> the metrics that counted in it; and those of eager calls
        # since a result was asked for.
        self.counted = weakref.WeakKeyDictionary()
        self.counted_eagerly: dict[str, list[weakref.ref]] = {}


_local = _Local()


def current_graph() -> tf.Graph | None:
    """The graph that is being traced, or None."""
    return None if tf.executing_eagerly() else tf.compat.v1.get_default_graph()


@contextlib.contextmanager
def counting_at_once() -> Iterator[None]:
    """Within it nothing waits: whoever enters it takes care of what is assigned."""
    before, _local.at_once = _local.at_once, True
    try:
        yield
    finally:
        _local.at_once = before


def counts_wait(training: bool | None) -> bool:
    """Whether a layer that is called now is to leave its metrics' variables alone."""
    return not (training or tf.executing_eagerly() or _local.at_once)


class StepMetric(keras.metrics.Metric):
    """A metric that a layer updates in `call`, by `count`.

    A subclass's `result` begins with `count_what_waits`, and the names in it with
    `qualifier`.

    Attributes:
        qualifier: Tells it from others of its name in one step: "" or ends with "_".
    """

    qualifier = ""

    def count(self, path: str, training: bool | None, *arguments: Any) -> None:
        """`update_state(*arguments)`, now or when the result is asked for.

        Args:
            path: Of the layer.
            training: Of the layer's call.
            *arguments: Of `update_state`.
        """
        self.counts_in(path, training)
        if not counts_wait(training):
            self.update_state(*arguments)
            return
        graph, waiting = _local.waiting.get(self, (None, []))
        if graph is not current_graph():
            waiting = []
        _local.waiting[self] = current_graph(), [*waiting, arguments]

    def counts_in(self, path: str, training: bool | None) -> None:
        """Notes that this step counts, for a qualifier if another of the name does."""
        self._path = path
        graph = current_graph()
        if graph is None and not training:
            return  # models that have nothing to do with each other, in turn
        step = _local.counted_eagerly
        if graph is not None:
            step = _local.counted.setdefault(graph, {})
        alike = step.setdefault(self.name, [])
        known = [m for m in (ref() for ref in alike) if m is not None]
        if any(m is self for m in known):
            return
        alike.append(weakref.ref(self))
        known.append(self)
        if len(known) > 1:
            for one, qualifier in zip(known, _qualifiers(known), strict=True):
                one.qualifier = qualifier

    def count_what_waits(self) -> None:
        """Assigns what was counted in this graph of inference."""
        graph, waiting = _local.waiting.pop(self, (None, []))
        if graph is current_graph():
            for arguments in waiting:
                self.update_state(*arguments)
        elif graph is not None and _is_within(graph, current_graph()):
            warnings.warn(
                f"Metrics of {self._path!r} leave out what was counted in a function "
                "within the step (a tf.function or tf.cond of the model's own): at "
                "training=False counts are assigned in the graph of the step only. "
                "Call the layer outside of that function, or use run_eagerly=True.",
                stacklevel=3,
            )
        if current_graph() is None:
            _local.counted_eagerly = {}


def _is_within(graph: tf.Graph, outer: tf.Graph | None) -> bool:
    """Whether `graph` is that of a function inside of `outer`."""
    while outer is not None and graph is not None:
        graph = getattr(graph, "outer_graph", None)
        if graph is outer:
            return True
    return False


def _qualifiers(metrics: list[StepMetric]) -> list[str]:
    """What differs in their layers' paths; their numbers, if nothing does."""
    paths = [metric._path.split("/")[:-1] for metric in metrics]
    length = max(len(path) for path in paths)
    padded = [[""] * (length - len(path)) + path for path in paths]
    differing = [i for i in range(length) if len({path[i] for path in padded}) > 1]
    found = ["_".join(p[i] for i in differing if p[i]) for p in padded]
    if len(set(found)) == len(found):
        return [f"{words}_" if words else "" for words in found]
    if current_graph() is None:
        # Eagerly, models that have nothing to do with each other may be called in turn.
        return [metric.qualifier for metric in metrics]
    return [f"{words}_{i}_".lstrip("_") for i, words in enumerate(found, 1)]
