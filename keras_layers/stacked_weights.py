"""Copies weights between a stacked `Transformer` and one that is not."""

from typing import Any

from keras_layers._stacked_variables import Blocks, check_same_variables
from keras_layers.stacked import Stacked


def stack_weights(unrolled: Any, stacked: Any) -> None:
    """Copies weights, seeds and metrics of a `Transformer` into a stacked one.

    Args:
        unrolled: A built `Transformer` with `stacked=False`.
        stacked: A built one with `stacked=True` and otherwise the same arguments.

    An optimizer's slots are not copied.

    Raises:
        ValueError: if the two do not match.
    """
    for stack, blocks in _check_pair(unrolled, stacked):
        stack.stack(blocks)
    for single, of_stacked in _outer_variables(unrolled, stacked):
        of_stacked.assign(single.numpy())


def unstack_weights(stacked: Any, unrolled: Any) -> None:
    """Inverse of `stack_weights`: copies a stacked `Transformer` into one that is not.

    Args:
        stacked: A built `Transformer` with `stacked=True`.
        unrolled: A built one with `stacked=False` and otherwise the same arguments.

    Raises:
        ValueError: if the two do not match.
    """
    for stack, blocks in _check_pair(unrolled, stacked):
        stack.unstack(blocks)
    for single, of_stacked in _outer_variables(unrolled, stacked):
        single.assign(of_stacked.numpy())


def _check_pair(unrolled: Any, stacked: Any) -> list[tuple[Stacked, Blocks]]:
    if getattr(unrolled, "stacked", None) is not False or not getattr(
        stacked, "stacked", False
    ):
        raise ValueError(
            "One Transformer must be stacked and the other not. Received: "
            f"stacked={getattr(unrolled, 'stacked', None)} for the unrolled one, "
            f"stacked={getattr(stacked, 'stacked', None)} for the stacked one"
        )
    for model in (unrolled, stacked):
        if not model.built:
            raise ValueError(
                "Both models must be built first, with model.build(). "
                f"Received: {model.name!r}, not built"
            )
    return [
        (stacked.encoder_stack, unrolled.encoder_blocks),
        (stacked.decoder_stack, unrolled.decoder_blocks),
    ]


def _outer_variables(unrolled: Any, stacked: Any) -> list[tuple[Any, Any]]:
    """Pairs of the variables outside the blocks, of one model and the other."""
    pairs: list[tuple[Any, Any]] = []
    for name in (
        "source_embedding",
        "target_embedding",
        "embedding_dropout",
        "encoder_norm",
        "decoder_norm",
        "projection",
    ):
        layers = [getattr(model, name) for model in (unrolled, stacked)]
        rows = [[] if layer is None else layer.variables for layer in layers]
        check_same_variables(rows)
        pairs += zip(*rows, strict=True)
    return pairs
