"""The mask that Keras attaches to a tensor."""

from typing import Any


def keras_mask(tensor: Any) -> Any | None:
    """Returns the mask of a layer's output, or None.

    Relies on: the attribute `_keras_mask` of tensors. Layers get masks as arguments;
    losses and metrics have no public way. On an upgrade, watch: a model's output that
    a loss or a metric gets still carries the mask.
    """
    return getattr(tensor, "_keras_mask", None)


def set_keras_mask(tensor: Any, mask: Any) -> None:
    """Attaches a mask to a tensor.

    Relies on: `keras.Loss` combines the mask of what its `call` returns with that of
    the predictions, and divides by the number of those left. On an upgrade, watch: a
    loss with `ignore_class` is still Keras's own.
    """
    tensor._keras_mask = mask
