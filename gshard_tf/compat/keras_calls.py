"""The call of a layer in progress, as Keras tracks it: model, autocast, losses."""

from collections.abc import Callable

import keras

# Private API: where Keras notes the call that is going on. A layer cannot learn by
# public ones which model it is part of. On an upgrade, check that `Layer.__call__`
# still keeps a `CallContext` with the outermost layer as its `entry_layer`.
from keras.src.backend import AutocastScope, get_autocast_scope
from keras.src.backend.common import global_state


def accumulated_batches() -> int | None:
    """Over how many batches the optimizer sums up gradients before it updates weights.

    It is that of the compiled model which is being called, from `fit` or otherwise.

    Returns:
        1 for an optimizer that updates the weights with each batch. None where no
        model with an optimizer is being called, as in a loop of one's own around a
        model that was not compiled.
    """
    call = global_state.get_global_attribute("current_call_ctx")
    optimizer = getattr(getattr(call, "entry_layer", None), "optimizer", None)
    if optimizer is None:
        return None
    # What scales the loss wraps the optimizer that accumulates.
    optimizer = getattr(optimizer, "inner_optimizer", optimizer)
    return getattr(optimizer, "gradient_accumulation_steps", None) or 1


def no_autocast() -> AutocastScope:
    """Context in which variables are read in the dtype in which they are stored.

    Relies on: `Layer.__call__` enters an `AutocastScope`, and variables are cast to its
    dtype when they are read. On an upgrade, watch: `AutocastScope(None)` casts nothing.
    """
    return AutocastScope(None)


def current_autocast() -> Callable[[], AutocastScope]:
    """Returns a function that makes contexts with the autocast dtype of now.

    Relies on: `get_autocast_scope` returns the innermost scope, or None. On an upgrade,
    watch: its `dtype` is still an argument of a new scope.
    """
    scope = get_autocast_scope()
    dtype = None if scope is None else scope.dtype
    return lambda: AutocastScope(dtype)


def clear_losses(layer: keras.layers.Layer) -> None:
    """Forgets the losses of the last call of a layer that no other layer tracks.

    Relies on: `Layer._clear_losses`, which Keras calls for the layers that it tracks.
    On an upgrade, watch: losses of two calls still add up without it.
    """
    layer._clear_losses()
