"""Custom routers: layers that are not a `Router`."""

import weakref
from collections.abc import Collection
from typing import Any

import keras
import tensorflow as tf

from keras_layers.routing.router import RouterStats
from keras_layers.routing.routing import Routing

# Router -> the layers that route by it.
_users: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


def stats_of(
    router: keras.layers.Layer, returned: Any, needed: Collection[str]
) -> tuple[Routing, RouterStats]:
    """Routing and stats that a router returned; a bare balancing loss becomes stats.

    Args:
        router: The router.
        returned: `(routing, stats)` or `(routing, aux_loss)`.
        needed: Fields of the stats that are in use.

    Raises:
        ValueError: for anything else, or if a needed field is missing.
    """
    pair = returned if type(returned) is tuple and len(returned) == 2 else (None, None)
    routing, stats = pair
    if not isinstance(routing, Routing):
        raise ValueError(
            "A router must return a tuple of a TokenChoiceRouting or an "
            "ExpertChoiceRouting, and RouterStats or a scalar, its balancing loss. "
            f"Received: {returned!r} of {router!r}"
        )
    if isinstance(stats, RouterStats):
        return routing, stats
    missing = sorted(set(needed) - {"aux_loss"})
    if missing:
        raise ValueError(
            "z_loss_coef and the router metrics z_loss and confidence must be left out "
            "unless the router returns RouterStats(aux_loss, z_loss, confidence). "
            f"Received: {router!r}, which returns a balancing loss, and {missing}"
        )
    aux_loss = tf.convert_to_tensor(stats, tf.float32)
    unknown = tf.constant(float("nan"))
    return routing, RouterStats(aux_loss, unknown, unknown)


def register_user(router: keras.layers.Layer, layer: keras.layers.Layer) -> None:
    """Registers `layer` as one that routes by `router`."""
    _users.setdefault(router, weakref.WeakSet()).add(layer)


def serialize_router(router: keras.layers.Layer) -> dict[str, Any]:
    """Config of a router, from which Keras makes one router if layers share it."""
    config = keras.saving.serialize_keras_object(router)
    if len(_users.get(router, ())) > 1:
        # Keras gives the configs of one object an id from the second on, and writes a
        # copy of the first: only the second time is it in what is returned.
        config = keras.saving.serialize_keras_object(router)
    return config
