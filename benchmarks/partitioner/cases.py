"""The cases: a model, a mesh and rules, and the communication derived by hand.

Bytes are those that a device receives in one train step, float32, as the compiled
program has them: the whole result of an all-gather or an all-reduce, the parts of an
all-to-all, and what a permutation sends. Sums of scalars are not counted.
"""

import dataclasses
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

B, L, M, H, N, D, V = 16, 64, 128, 512, 8, 16, 4096
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
    ),
    Case(
        "feed-forward, width split",
        lambda: tokens(FeedForward(H)),
        EIGHT,
        {"rules": {"mlp": "x"}},
        # The outputs' partial sums, and those of the inputs' gradient.
        {"all-reduce": 2 * TOKENS},
    ),
    Case(
        "feed-forward, batch and width split",
        lambda: tokens(FeedForward(H)),
        GRID,
        {"rules": {"batch": "data", "mlp": "model"}},
        {
            "all-reduce": 2 * TOKENS // 4 + FFN // 2 + SCALE,
        },
    ),
    Case(
        "feed-forward, FSDP",
        lambda: tokens(FeedForward(H)),
        EIGHT,
        {"rules": {"batch": "x"}, "fsdp": "x", "fsdp_min_bytes": M * H},
        # Both matrices are gathered once. A CPU has no reduce-scatter.
        {"all-gather": FFN, "all-reduce": FFN + SCALE},
    ),
    Case(
        "attention, heads split",
        attention(),
        EIGHT,
        {"rules": {"heads": "x"}},
        {"all-reduce": 2 * TOKENS},
    ),
    Case(
        "attention, length split, gathered",
        attention(),
        EIGHT,
        {"rules": {"length": "x"}},
        # Keys and values; their gradients' sums.
        {"all-gather": 2 * TOKENS, "all-reduce": 2 * TOKENS + QKVO + SCALE},
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
    ),
    Case(
        "attention, length split, all-to-all",
        attention(context_parallel="all_to_all"),
        EIGHT,
        {"rules": {"length": "x"}},
        {"all-to-all": 8 * TOKENS // 8, "all-reduce": QKVO + SCALE},
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
    ),
    Case(
        "experts split with groups",
        lambda: tokens(MoELayer(8, H)),
        EIGHT,
        {"rules": {"batch": "x", "group": "x", "expert": "x"}},
        # To the experts and back, twice; each expert has room for 2 * S / E tokens of
        # each group. The router's gradient.
        {"all-to-all": 4 * 2 * TOKENS // 8, "all-reduce": M * 8 * 4 + SCALE},
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
    ),
    Case(
        "encoder blocks in 8 stages, 16 microbatches",
        lambda: pipeline(8, 16),
        EIGHT,
        {"rules": {"stage": "x"}},
        # A microbatch in each of 16 + 7 ticks, forward and backward; the last stage's
        # outputs and the first one's gradient.
        {"collective-permute": 2 * 23 * TOKENS // 16, "all-reduce": 2 * TOKENS},
    ),
    Case(
        "embedding, vocabulary split",
        lambda: [TokenEmbedding(V, M)],
        EIGHT,
        {"rules": {"vocab": "x"}},
        # Each device looks up what it has, and the rest is 0.
        {"all-reduce": TOKENS},
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
        y=(B, L),
        loss=TokenCrossentropy,
    ),
    Case(
        "logits and Keras's loss, vocabulary split",
        lambda: tokens(VocabularyProjection(V))[:-1],
        EIGHT,
        {"rules": {"vocab": "x"}},
        {"all-reduce": 3 * LABELS + TOKENS},
        y=(B, L),
        loss=lambda: keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    ),
]
