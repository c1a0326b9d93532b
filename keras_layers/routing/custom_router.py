"""Routers that are no `Router`: layers of a user's own."""

import weakref
from collections.abc import Collection
from typing import Any

import keras
import tensorflow as tf

from keras_layers.routing.results import Routing, SlotRouting
from keras_layers.routing.router import RouterReport

# Which layers route by which router.
_users: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


def report_of(
    router: keras.layers.Layer, returned: Any, needed: Collection[str]
) -> tuple[Routing | SlotRouting, RouterReport]:
    """What a router returned, with a bare balancing loss made a report.

    Args:
        router: Who returned it.
        returned: `(routing, report)` or `(routing, aux_loss)`.
        needed: Which fields of the report somebody wants to know.

    Raises:
        ValueError: for anything else, or if what is needed is not in it.
    """
    pair = returned if type(returned) is tuple and len(returned) == 2 else (None, None)
    routing, said = pair
    if not isinstance(routing, Routing | SlotRouting):
        raise ValueError(
            "A router returns a tuple of a Routing (or SlotRouting) and a RouterReport "
            f"or a scalar, its balancing loss. Received: {returned!r} of {router!r}"
        )
    if isinstance(said, RouterReport):
        return routing, said
    missing = sorted(set(needed) - {"aux_loss"})
    if missing:
        raise ValueError(
            "z_loss_coef and the router metrics z_loss and confidence are for a router "
            "that returns a RouterReport(aux_loss, z_loss, confidence). "
            f"Received: {router!r}, which returns a balancing loss, and {missing}"
        )
    aux_loss = tf.convert_to_tensor(said, tf.float32)
    unknown = tf.constant(float("nan"))
    return routing, RouterReport(aux_loss, unknown, unknown)


def use(router: keras.layers.Layer, layer: keras.layers.Layer) -> None:
    """Notes that `layer` routes by `router`."""
    _users.setdefault(router, weakref.WeakSet()).add(layer)


def serialize_router(router: keras.layers.Layer) -> dict[str, Any]:
    """The config of a router, of which Keras makes one again if layers share it."""
    config = keras.saving.serialize_keras_object(router)
    if len(_users.get(router, ())) > 1:
        # Keras gives the configs of one object an id from the second on, and writes a
        # copy of the first: only the second time is it in what is returned.
        config = keras.saving.serialize_keras_object(router)
    return config
