"""What Keras knows of the call that is going on."""

# Private API: where Keras notes the call that is going on. A layer cannot learn by
# public ones which model it is part of. On an upgrade, check that `Layer.__call__`
# still keeps a `CallContext` with the outermost layer as its `entry_layer`.
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
