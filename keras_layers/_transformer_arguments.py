"""Checks of the arguments and inputs of the `Transformer`."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import keras

from keras_layers._arguments import check_int, check_token_id
from keras_layers._segments import check_both_or_none, check_segment_ids


def check_vocabularies(
    source_vocab_size: int,
    target_vocab_size: int,
    pad_id: int,
    bos_id: int | None,
    share_embeddings: bool,
) -> tuple[int, int, int, int | None]:
    """Raises ValueError unless the ids are in the vocabularies, and these fit.

    Returns:
        The first four arguments, as Python numbers.
    """
    source_vocab_size = check_int("source_vocab_size", source_vocab_size, 1)
    target_vocab_size = check_int("target_vocab_size", target_vocab_size, 1)
    smaller = min(source_vocab_size, target_vocab_size)
    pad_id = check_token_id("pad_id", pad_id, smaller)
    if bos_id is not None:
        bos_id = check_token_id("bos_id", bos_id, target_vocab_size)
    if share_embeddings and source_vocab_size != target_vocab_size:
        raise ValueError(
            "Vocabularies must be of one size with share_embeddings. Received: "
            f"source_vocab_size={source_vocab_size}, "
            f"target_vocab_size={target_vocab_size}"
        )
    return source_vocab_size, target_vocab_size, pad_id, bos_id


def check_key_dim(key_dim: int | None, model_dim: int, num_heads: int) -> int:
    """Returns `key_dim`, by default the model's width divided among its heads."""
    if key_dim is None:
        if model_dim % num_heads:
            raise ValueError(
                "Without key_dim, model_dim must be a multiple of num_heads. "
                f"Received: model_dim={model_dim}, num_heads={num_heads}"
            )
        key_dim = model_dim // num_heads
    return check_int("key_dim", key_dim, 1)


def check_moe_options(
    num_experts: int | None,
    moe_options: Mapping[str, Any] | None,
    decoder_moe_options: Mapping[str, Any] | None,
) -> None:
    """Raises ValueError unless the options suit every `MoELayer` of the model."""
    if not num_experts and (moe_options or decoder_moe_options):
        raise ValueError(
            "moe_options must be empty for a model without experts. Received: "
            f"moe_options={moe_options}, decoder_moe_options={decoder_moe_options} "
            f"and num_experts={num_experts}"
        )
    for options in (moe_options or {}, decoder_moe_options or {}):
        if reserved := set(options) & {"name", "num_experts", "hidden_dim"}:
            raise ValueError(
                "moe_options must not contain arguments that the model sets itself. "
                f"Received: {sorted(reserved)}"
            )
        if isinstance(options.get("router"), keras.layers.Layer):
            raise ValueError(
                "The router of moe_options cannot be a layer, which all blocks would "
                'share. Pass its arguments, such as {"kind": "top_k", "k": 1}. '
                f"Received: router={options['router']!r}"
            )


def check_stackable(
    unit: int, num_encoder_layers: int, num_decoder_layers: int
) -> None:
    """Raises ValueError unless both stacks consist of whole units of blocks."""
    if num_encoder_layers % unit or num_decoder_layers % unit:
        raise ValueError(
            "The numbers of layers of a stacked model must be multiples of "
            f"moe_every={unit}, the blocks of the unit that it repeats. Received: "
            f"num_encoder_layers={num_encoder_layers}, "
            f"num_decoder_layers={num_decoder_layers}"
        )


def check_microbatches(microbatches: int, stacked: bool, remat: bool | str) -> None:
    """Raises ValueError unless the model's stacks can be pipelines."""
    if not stacked or remat is not True:
        raise ValueError(
            "`microbatches` must be None without stacked=True and remat=True: a "
            "pipeline passes through stacked weights, and computes activations again "
            f"for the gradient. Received: microbatches={microbatches}, "
            f"stacked={stacked}, remat={remat!r}"
        )


class TransformerInputs(NamedTuple):
    """Arguments of a call of the model.

    Attributes:
        source: `[B, L]`, ids.
        target: `[B, T]`, ids.
        source_segment_ids: `[B, L]`, or None: each row is one sequence.
        target_segment_ids: `[B, T]`, or None.
        labels: `[B, T]`, what follows each target token, or None.
    """

    source: Any
    target: Any
    source_segment_ids: Any = None
    target_segment_ids: Any = None
    labels: Any = None


def transformer_inputs(inputs: Any) -> TransformerInputs:
    """Returns what `inputs` consists of, for tensors or for their shapes.

    Args:
        inputs: A pair, a tuple of 4, or a dict.

    Raises:
        ValueError: for anything else, or segment ids of one side only.
    """
    names = TransformerInputs._fields
    if isinstance(inputs, Mapping):
        if not set(names[:2]) <= set(inputs) <= set(names):
            raise ValueError(
                'A dict of inputs must have the keys "source" and "target", and may '
                'have "source_segment_ids", "target_segment_ids" and "labels". '
                f"Received: {sorted(inputs)}"
            )
        found = TransformerInputs(**inputs)
    elif isinstance(inputs, list | tuple) and len(inputs) in (2, 4):
        found = TransformerInputs(*inputs)
    else:
        count = f" of {len(inputs)}" if isinstance(inputs, list | tuple) else ""
        raise ValueError(
            "Inputs must be a pair (source_ids, target_ids), the same with "
            "(..., source_segment_ids, target_segment_ids), or a dict. "
            f"Received: {type(inputs).__name__}{count}"
        )
    check_both_or_none(*zip(names[2:4], found[2:4], strict=True))
    return found


def checked_inputs(inputs: Any) -> TransformerInputs:
    """Returns `transformer_inputs` of tensors, whose shapes are checked."""
    found = transformer_inputs(inputs)
    source, target, source_segment_ids, target_segment_ids, labels = found
    if source_segment_ids is not None:
        check_segment_ids("source_segment_ids", source_segment_ids, source.shape)
        check_segment_ids("target_segment_ids", target_segment_ids, target.shape)
    if labels is not None and not labels.shape.is_compatible_with(target.shape):
        raise ValueError(
            f"Labels must have the shape {target.shape} of the target. Received: "
            f"shape {labels.shape}"
        )
    return found
