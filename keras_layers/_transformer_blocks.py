"""The blocks of the `Transformer`, made from its arguments, one by one or stacked."""

from typing import Any

from keras_layers._seeds import child_seed
from keras_layers.blocks import DecoderBlock, EncoderBlock
from keras_layers.moe.options import block_moe_options
from keras_layers.stacked import Stacked


def make_block(model: Any, side: str, index: int) -> EncoderBlock | DecoderBlock:
    """Returns block `index` of a side, not built.

    Args:
        model: The `Transformer`, with its arguments as attributes.
        side: "encoder" or "decoder".
        index: From 0.
    """
    number = index + 1
    options = None
    if model.num_experts and number % model.moe_every == 0:
        options = model.moe_options
        if side == "decoder" and model.decoder_moe_options is not None:
            options = model.decoder_moe_options
        options = block_moe_options(options, model.seed, side, number)
    make = EncoderBlock if side == "encoder" else DecoderBlock
    return make(
        num_heads=model.num_heads,
        key_dim=model.key_dim,
        hidden_dim=model.hidden_dim,
        num_experts=None if options is None else model.num_experts,
        dropout=model.dropout,
        moe_options=options,
        seed=child_seed(model.seed, side, number),
        # A stack computes whole repetitions again by itself.
        remat=False if model.stacked and model.remat is True else model.remat,
        context_parallel=model.context_parallel,
        dtype=model.dtype_policy,
        name=f"{side}_{number}",
    )


def build_block(block: EncoderBlock | DecoderBlock, model_dim: int) -> None:
    """Builds a block for inputs `[B, L, M]`, and a memory as wide."""
    hidden = (None, None, model_dim)
    if isinstance(block, DecoderBlock):
        block.build(hidden, hidden)
    else:
        block.build(hidden)


def make_stack(model: Any, side: str, num_layers: int) -> Stacked:
    """Returns all blocks of a side as a loop over stacked weights."""
    unit = model.moe_every if model.num_experts else 1

    def make_blocks(repetition: int) -> list[EncoderBlock | DecoderBlock]:
        blocks = []
        for index in range(repetition * unit, (repetition + 1) * unit):
            blocks.append(make_block(model, side, index))
            # Before the next is made: both draw from the global seed.
            build_block(blocks[-1], model.model_dim)
        return blocks

    return Stacked(
        make_blocks,
        num_layers // unit,
        model.remat is True,
        model.microbatches,
        dtype=model.dtype_policy,
        name=side,
    )
