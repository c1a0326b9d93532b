"""The cases: a model, a mesh and rules; communication and memory derived by hand.

Bytes of communication are those that a device receives in one train step, float32, as
the compiled program has them: the whole result of an all-gather or an all-reduce, the
parts of an all-to-all, and what a permutation sends. Sums of scalars are not counted.

Bytes of memory are those that a layout takes by itself above an equal share of all
arrays: of arrays that are whole on a device, or in fewer parts than devices, those that
must be alive at once where they are most. A sum takes the place of its parts, and a
weight's gradient is added before the next one is computed.
"""

import dataclasses
import os
from collections.abc import Callable, Mapping
from typing import Any

import keras

import gshard_tf
from keras_layers import (
    EncoderBlock,
    FeedForward,
    MoELayer,
    MultiHeadAttention,
    TokenCrossentropy,
    TokenEmbedding,
    VocabularyProjection,
)
from keras_layers.stacked import Stacked

#: With `LARGE=1` in the environment those of a model, which are compiled and not run.
IS_LARGE = os.environ.get("LARGE") == "1"
B, L, M, H, N, D, V = (
    (64, 512, 1024, 4096, 16, 64, 32768)
    if IS_LARGE
    else (16, 64, 128, 512, 8, 16, 4096)
)
TOKENS = B * L * M * 4  # bytes of the activations [B, L, M]
EIGHT = {"x": 8}
GRID = {"data": 4, "model": 2}


@dataclasses.dataclass(frozen=True)
class Case:
    """One model on one mesh.

    Attributes:
        name: For the table.
        layers: Makes the layers, which run one after another.
        mesh: Axes and sizes.
        rules: The arguments of `AxisRules`.
        expected: Bytes by kind, derived by hand.
        kept: Bytes of memory of a device above an equal share, derived by hand.
        x: Shape of the inputs.
        y: Shape of the targets; None: that of the inputs.
        ids: The number of different ids, where inputs are ids.
        loss: Makes the loss, of targets that are ids, too; None: mean squares.
    """

    name: str
    layers: Callable[[], list[Callable]]
    mesh: Mapping[str, int]
    rules: Mapping[str, Any]
    expected: Mapping[str, int]
    kept: int = 0
    x: tuple[int, ...] = (B, L, M)
    y: tuple[int, ...] | None = None
    ids: int | None = None
    loss: Callable[[], keras.losses.Loss] | None = None


class Annotate(keras.layers.Layer):
    """The identity, annotated."""

    def __init__(self, *axes: str | None, **kwargs: Any):
        super().__init__(**kwargs)
        self.axes = axes

    def call(self, x: Any) -> Any:
        return gshard_tf.annotate(x, self.axes)


def above_share(bytes_: int, parts: int = 1) -> int:
    """The bytes of an array in some parts, without those of an eighth of it."""
    return bytes_ // parts - bytes_ // 8


def tokens(*layers: Callable) -> list[Callable]:
    """Layers behind one that needs their gradient, whose own inputs are data."""
    first = keras.layers.EinsumDense("blm,m->blm", (None, M), name="scale")
    spec = ("batch", "length", None)
    return [Annotate(*spec), first, *layers, Annotate(*spec)]


def attention(**kwargs: Any) -> Callable[[], list[Callable]]:
    return lambda: tokens(MultiHeadAttention(N, D, **kwargs))


def pipeline(layers: int, microbatches: int) -> list[Callable]:
    """A stack of encoder blocks that microbatches pass through."""

    def make(number: int) -> list[EncoderBlock]:
        block = EncoderBlock(N, D, H, dropout=0.0, name=f"block_{number + 1}")
        # Smooth: ReLU may differ by a whole unit where rounding does.
        block.feed_forward.activation = keras.activations.gelu
        block.build((None, None, M))
        return [block]

    return tokens(Stacked(make, layers, True, microbatches))


SCALE = M * 4  # its weights
QKVO = 4 * M * N * D * 4  # the weights of an attention
FFN = 2 * M * H * 4  # of a feed-forward layer
LABELS = B * L * 4  # a float32 for each token

SEQUENCES = [
    Case(
        "feed-forward, batch split",
        lambda: tokens(FeedForward(H)),
        EIGHT,
        {"rules": {"batch": "x"}},
        # The gradients' sums.
        {"all-reduce": FFN + SCALE},
        # The gradient of one matrix.
        kept=above_share(FFN // 2),
    ),
    Case(
        "feed-forward, width split",
        lambda: tokens(FeedForward(H)),
        EIGHT,
        {"rules": {"mlp": "x"}},
        # The outputs' partial sums, and those of the inputs' gradient.
        {"all-reduce": 2 * TOKENS},
        # The layer's inputs, for the gradient of a matrix, and its outputs' gradient.
        kept=2 * above_share(TOKENS),
    ),
    Case(
        "feed-forward, batch and width split",
        lambda: tokens(FeedForward(H)),
        GRID,
        {"rules": {"batch": "data", "mlp": "model"}},
        {
            "all-reduce": 2 * TOKENS // 4 + FFN // 2 + SCALE,
        },
        kept=2 * above_share(TOKENS, 4),
    ),
    Case(
        "feed-forward, FSDP",
        lambda: tokens(FeedForward(H)),
        EIGHT,
        {"rules": {"batch": "x"}, "fsdp": "x", "fsdp_min_bytes": M * H},
        # Both matrices are gathered once. A CPU has no reduce-scatter.
        {"all-gather": FFN, "all-reduce": FFN + SCALE},
        # Both matrices, gathered once, and the gradient of one before its sum.
        kept=3 * above_share(FFN // 2),
    ),
    Case(
        "attention, heads split",
        attention(),
        EIGHT,
        {"rules": {"heads": "x"}},
        {"all-reduce": 2 * TOKENS},
        # The layer's inputs, for three gradients, and its outputs' gradient.
        kept=2 * above_share(TOKENS),
    ),
    Case(
        "attention, length split, gathered",
        attention(),
        EIGHT,
        {"rules": {"length": "x"}},
        # Keys and values; their gradients' sums.
        {"all-gather": 2 * TOKENS, "all-reduce": 2 * TOKENS + QKVO + SCALE},
        # Keys and values forward. Backward keys and one gradient, before its sum: the
        # gradient of attention's weights was the last to need values.
        kept=2 * above_share(TOKENS),
    ),
    Case(
        "attention, length split, ring",
        attention(context_parallel="ring"),
        EIGHT,
        {"rules": {"length": "x"}},
        # To each of 7 others: keys and values; then queries, the gradients of queries
        # and outputs, and 3 statistics of each row of scores. The gradients go home.
        {
            "collective-permute": 7 * (5 * TOKENS // 8 + 3 * B * N * L * 4 // 8)
            + TOKENS // 8,
            "all-reduce": QKVO + SCALE,
        },
        # Keys and values that are received while those before are used.
        kept=2 * TOKENS // 8,
    ),
    Case(
        "attention, length split, all-to-all",
        attention(context_parallel="all_to_all"),
        EIGHT,
        {"rules": {"length": "x"}},
        {"all-to-all": 8 * TOKENS // 8, "all-reduce": QKVO + SCALE},
        # One array, before and after it is sent.
        kept=TOKENS // 8,
    ),
    Case(
        "attention, batch, heads and length split, ring",
        attention(context_parallel="ring"),
        {"data": 2, "heads": 2, "length": 2},
        {"rules": {"batch": "data", "heads": "heads", "length": "length"}},
        {
            "collective-permute": 5 * TOKENS // 8
            + 3 * B * N * L * 4 // 8
            + TOKENS // 8,
            # Outputs and the inputs' gradient over the heads; gradients over the rest.
            "all-reduce": 2 * TOKENS // 4 + QKVO // 2 + SCALE,
        },
        # Inputs and the outputs' gradient are in 4 parts; keys and values in transit.
        kept=2 * above_share(TOKENS, 4) + 2 * TOKENS // 8,
    ),
    Case(
        "experts split with groups",
        lambda: tokens(MoELayer(8, H)),
        EIGHT,
        {"rules": {"batch": "x", "group": "x", "expert": "x"}},
        # To the experts and back, twice; each expert has room for 2 * S / E tokens of
        # each group. The router's gradient.
        {"all-to-all": 4 * 2 * TOKENS // 8, "all-reduce": M * 8 * 4 + SCALE},
        # Slots, before and after they are sent.
        kept=2 * TOKENS // 8,
    ),
    Case(
        "experts and their width split",
        lambda: tokens(MoELayer(8, H)),
        GRID,
        {
            "rules": {
                "batch": "data",
                "group": "data",
                "expert": "data",
                "mlp": "model",
            }
        },
        {
            "all-to-all": 4 * 2 * TOKENS // 4,
            "all-reduce": 2 * 2 * TOKENS // 4 + M * 8 * 4 + SCALE,
        },
        # Tokens in 4 parts. So are the slots, and the gradient of their outputs.
        kept=above_share(TOKENS, 4) + 2 * above_share(2 * TOKENS, 4),
    ),
    Case(
        "encoder blocks in 8 stages, 16 microbatches",
        lambda: pipeline(8, 16),
        EIGHT,
        {"rules": {"stage": "x"}},
        # A microbatch in each of 16 + 7 ticks, forward and backward; the last stage's
        # outputs and the first one's gradient.
        {"collective-permute": 2 * 23 * TOKENS // 16, "all-reduce": 2 * TOKENS},
        # The gradient of the outputs on all stages, and that of the inputs, which the
        # first one has and all have room for; inputs of layers in bubbles.
        kept=2 * above_share(TOKENS) + 7 * TOKENS // 16,
    ),
    Case(
        "embedding, vocabulary split",
        lambda: [TokenEmbedding(V, M)],
        EIGHT,
        {"rules": {"vocab": "x"}},
        # Each device looks up what it has, and the rest is 0.
        {"all-reduce": TOKENS},
        # The outputs, or their gradient.
        kept=above_share(TOKENS),
        x=(B, L),
        y=(B, L, M),
        ids=V,
    ),
    Case(
        "logits and loss, vocabulary split",
        lambda: tokens(VocabularyProjection(V))[:-1],
        EIGHT,
        {"rules": {"vocab": "x"}},
        # Maxima, sums and the labels' logits; the inputs' gradient.
        {"all-reduce": 3 * LABELS + TOKENS},
        # The inputs, for the table's gradient; or their own gradient.
        kept=above_share(TOKENS),
        y=(B, L),
        loss=TokenCrossentropy,
    ),
    Case(
        "logits and Keras's loss, vocabulary split",
        lambda: tokens(VocabularyProjection(V))[:-1],
        EIGHT,
        {"rules": {"vocab": "x"}},
        {"all-reduce": 3 * LABELS + TOKENS},
        kept=above_share(TOKENS),
        y=(B, L),
        loss=lambda: keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    ),
]
