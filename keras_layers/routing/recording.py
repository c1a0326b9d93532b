"""Recording of routings, and their replay."""

import contextlib
import threading
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

from keras_layers.routing.routing import Routing
from keras_layers.step_metrics import current_graph

_active = threading.local()

Routings = dict[str, list[Routing]]


@contextlib.contextmanager
def record_routing() -> Iterator[Routings]:
    """Collects the routing of every `MoELayer` called within.

    Works on eager calls, `model(x)`; and inside a `tf.function` of your own that
    returns the routings. `fit` and `predict` trace functions of their own, whose
    tensors cannot leave them: use `run_eagerly=True` there.

    Yields:
        A dict, filled as layers are called: name of the layer -> its routings, one per
        call.
    """
    routings: Routings = defaultdict(list)
    previous = getattr(_active, "recording", None)
    _active.recording = (routings, current_graph())
    try:
        yield routings
    finally:
        _active.recording = previous


@contextlib.contextmanager
def replay_routing(
    routings: Mapping[str, Sequence[Routing]],
) -> Iterator[None]:
    """Makes every `MoELayer` called within route as recorded, weights included.

    Routers are not called: they get no gradients, and add no loss.

    Args:
        routings: As from `record_routing`. Layers that it does not name route as
            usual.

    Raises:
        ValueError: on leaving, if recorded routings were not used; in a layer, if it is
            called more often than it was recorded.
    """
    previous = getattr(_active, "replaying", None)
    remaining = {name: list(calls) for name, calls in routings.items()}
    _active.replaying = remaining
    try:
        yield
    finally:
        _active.replaying = previous
    unused = {name: len(calls) for name, calls in remaining.items() if calls}
    if unused:
        raise ValueError(
            "All recorded routings must be used, by layers of the same names that are "
            f"called as often. Received: {unused} left over"
        )


def next_recorded(name: str) -> Routing | None:
    """Next recorded routing for the layer of this name, or None."""
    remaining = getattr(_active, "replaying", None)
    if remaining is None or name not in remaining:
        return None
    if not remaining[name]:
        raise ValueError(
            "A layer must not be called more often than its routing was recorded. "
            f"Received: one call too many of layer {name!r}"
        )
    return remaining[name].pop(0)


def record(name: str, routing: Routing) -> None:
    """Adds a layer's routing to the recording in progress, if any."""
    recording = getattr(_active, "recording", None)
    if recording is None:
        return
    routings, graph = recording
    if graph is not current_graph():
        raise ValueError(
            "A routing must be recorded in the graph that record_routing() was entered "
            "in: outside of its own it is of no use. Call the model itself, model(x), "
            "or use run_eagerly=True; or enter record_routing() inside the function. "
            f"Received: layer {name!r}, called in another graph"
        )
    routings[name].append(routing)


def routing_is_watched() -> bool:
    """Returns whether `record_routing` or `replay_routing` is active."""
    active = _active
    return (
        getattr(active, "recording", None) is not None
        or getattr(active, "replaying", None) is not None
    )
