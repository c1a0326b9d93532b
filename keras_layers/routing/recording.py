"""Recording what routers decide, and deciding it again."""

import contextlib
import threading
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

from keras_layers.routing.results import Routing, SlotRouting
from keras_layers.step_metrics import current_graph

_active = threading.local()

Plans = dict[str, list[Routing | SlotRouting]]


@contextlib.contextmanager
def record_routing() -> Iterator[Plans]:
    """Collects the routing of every `MoELayer` called within.

    Works on eager calls, `model(x)`; and inside a `tf.function` of your own that
    returns what was collected. `fit` and `predict` trace functions of theirs, whose
    tensors cannot come out: use `run_eagerly=True` there.

    Yields:
        A dict, filled as layers are called: name of the layer -> its routings, one per
        call.
    """
    plans: Plans = defaultdict(list)
    previous = getattr(_active, "recording", None)
    _active.recording = (plans, current_graph())
    try:
        yield plans
    finally:
        _active.recording = previous


@contextlib.contextmanager
def replay_routing(
    plans: Mapping[str, Sequence[Routing | SlotRouting]],
) -> Iterator[None]:
    """Makes every `MoELayer` called within route as recorded, weights included.

    Routers are not asked: they get no gradients, and add no loss.

    Args:
        plans: As from `record_routing`. Layers that it does not name route by
            themselves.

    Raises:
        ValueError: on leaving, if recorded routings were not used; in a layer, if it is
            called more often than it was recorded.
    """
    previous = getattr(_active, "replaying", None)
    left = {name: list(routings) for name, routings in plans.items()}
    _active.replaying = left
    try:
        yield
    finally:
        _active.replaying = previous
    unused = {name: len(routings) for name, routings in left.items() if routings}
    if unused:
        raise ValueError(
            "Recorded routings were not used: no layer of that name was called so "
            f"often. Received: {unused} left over"
        )


def recorded(name: str) -> Routing | SlotRouting | None:
    """The routing that a layer of this name is to use, if there is one."""
    left = getattr(_active, "replaying", None)
    if left is None or name not in left:
        return None
    if not left[name]:
        raise ValueError(
            f"The layer {name!r} was called more often than its routing was recorded."
        )
    return left[name].pop(0)


def record(name: str, routing: Routing | SlotRouting) -> None:
    """Notes what a layer of this name did, if anybody wants to know."""
    recording = getattr(_active, "recording", None)
    if recording is None:
        return
    plans, graph = recording
    if graph is not current_graph():
        raise ValueError(
            f"The routing of {name!r} belongs to another graph than record_routing() "
            "and would be of no use outside of it. Call the model itself, model(x), "
            "or use run_eagerly=True; or enter record_routing() inside the function."
        )
    plans[name].append(routing)


def routing_is_watched() -> bool:
    """Whether `record_routing` or `replay_routing` is going on."""
    active = _active
    return (
        getattr(active, "recording", None) is not None
        or getattr(active, "replaying", None) is not None
    )
