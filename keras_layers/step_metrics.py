"""Metrics of layers: the graphs in which they count, and their names in logs.

Keras adds the results of a layer's metrics to the logs, but calls `update_state` for
compiled metrics only. When a layer updates its own metric in `call`, every graph of the
layer assigns variables, also one that is frozen, exported or made for `predict`; and
results of two layers of one name overwrite each other. So:

* A layer in training, or called eagerly, counts at once. In a graph of inference the
  counts are deferred: they are assigned when the metric's result is read in that graph,
  as `evaluate` does in each step. Other graphs assign nothing.
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

Deferred = tuple[tf.Graph | None, list[tuple[Any, ...]]]
MetricsByName = dict[str, list[weakref.ref]]


class _Local(threading.local):
    """State of one thread: TensorFlow traces the replicas of a step in threads."""

    def __init__(self):
        self.immediate = False
        # Metric -> the graph, and the deferred arguments of `update_state` in it: of
        # the last graph only, which this keeps alive.
        self.deferred: weakref.WeakKeyDictionary[StepMetric, Deferred] = (
            weakref.WeakKeyDictionary()
        )
        # Graph -> name -> the metrics that counted in it; and those of eager calls
        # since a result was read.
        self.counted: weakref.WeakKeyDictionary[tf.Graph, MetricsByName] = (
            weakref.WeakKeyDictionary()
        )
        self.counted_eagerly: MetricsByName = {}


_local = _Local()


def current_graph() -> tf.Graph | None:
    """Returns the graph that is being traced, or None."""
    return None if tf.executing_eagerly() else tf.compat.v1.get_default_graph()


@contextlib.contextmanager
def immediate_counts() -> Iterator[None]:
    """Context without deferred counts: the caller handles the assignments."""
    before, _local.immediate = _local.immediate, True
    try:
        yield
    finally:
        _local.immediate = before


def counts_are_deferred(training: bool | None) -> bool:
    """Returns whether a layer called now must not assign its metrics' variables."""
    return not (training or tf.executing_eagerly() or _local.immediate)


class StepMetric(keras.metrics.Metric):
    """A metric that a layer updates in `call`, by `count`.

    A subclass's `result` begins with `count_deferred`, and the names in it with
    `qualifier`.

    Attributes:
        qualifier: Prefix among metrics of one name in a step: "" or ends with "_".
    """

    qualifier = ""

    def count(self, path: str, training: bool | None, *arguments: Any) -> None:
        """Calls `update_state(*arguments)`, now or when the result is read.

        Args:
            path: Path of the layer.
            training: Argument of the layer's call.
            *arguments: Arguments of `update_state`.
        """
        self.join_step(path, training)
        if not counts_are_deferred(training):
            self.update_state(*arguments)
            return
        graph, updates = _local.deferred.get(self, (None, []))
        if graph is not current_graph():
            updates = []
        _local.deferred[self] = current_graph(), [*updates, arguments]

    def join_step(self, path: str, training: bool | None) -> None:
        """Registers the metric in this step, for qualifiers among equal names."""
        self.layer_path = path
        graph = current_graph()
        if graph is None and not training:
            return  # unrelated models may be called in turn
        step = _local.counted_eagerly
        if graph is not None:
            step = _local.counted.setdefault(graph, {})
        same_name = step.setdefault(self.name, [])
        metrics = [m for m in (ref() for ref in same_name) if m is not None]
        if any(m is self for m in metrics):
            return
        same_name.append(weakref.ref(self))
        metrics.append(self)
        if len(metrics) > 1:
            for metric, qualifier in zip(metrics, _qualifiers(metrics), strict=True):
                metric.qualifier = qualifier

    def count_deferred(self) -> None:
        """Assigns the deferred counts of this graph of inference."""
        graph, updates = _local.deferred.pop(self, (None, []))
        if graph is current_graph():
            for arguments in updates:
                self.update_state(*arguments)
        elif graph is not None and _is_within(graph, current_graph()):
            warnings.warn(
                f"Metrics of {self.layer_path!r} leave out counts from a function "
                "within the step (a tf.function or tf.cond of the model's own): at "
                "training=False counts are assigned in the graph of the step only. "
                "Call the layer outside of that function, or use run_eagerly=True.",
                stacklevel=3,
            )
        if current_graph() is None:
            _local.counted_eagerly = {}


def _is_within(graph: tf.Graph, outer: tf.Graph | None) -> bool:
    """Returns whether `graph` is that of a function inside `outer`."""
    while outer is not None and graph is not None:
        graph = getattr(graph, "outer_graph", None)
        if graph is outer:
            return True
    return False


def _qualifiers(metrics: list[StepMetric]) -> list[str]:
    """Qualifiers from the differences of the layers' paths, or else from numbers."""
    paths = [metric.layer_path.split("/")[:-1] for metric in metrics]
    length = max(len(path) for path in paths)
    padded = [[""] * (length - len(path)) + path for path in paths]
    differing = [i for i in range(length) if len({path[i] for path in padded}) > 1]
    names = ["_".join(p[i] for i in differing if p[i]) for p in padded]
    if len(set(names)) == len(names):
        return [f"{words}_" if words else "" for words in names]
    if current_graph() is None:
        # Eagerly, unrelated models may be called in turn.
        return [metric.qualifier for metric in metrics]
    return [f"{words}_{i}_".lstrip("_") for i, words in enumerate(names, 1)]
