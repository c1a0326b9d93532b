"""Cases of two and three mesh axes: joined ones, and several kinds of split at once."""

from benchmarks.partitioner.cases import (
    FFN,
    GRID,
    LABELS,
    QKVO,
    SCALE,
    TOKENS,
    B,
    Case,
    H,
    L,
    M,
    V,
    above_share,
    attention,
    tokens,
)
from keras_layers import (
    FeedForward,
    MoELayer,
    TokenCrossentropy,
    TokenEmbedding,
    VocabularyProjection,
)

CUBE = {"data": 2, "x": 2, "y": 2}
ALL = ("data", "x", "y")
ROUTER = M * 8 * 4  # the router's weights, of 8 experts

GRIDS = [
    Case(
        "feed-forward, batch over two axes",
        lambda: tokens(FeedForward(H)),
        GRID,
        {"rules": {"batch": ("data", "model")}},
        # As over one axis of as many devices.
        {"all-reduce": FFN + SCALE},
        # The gradient of one matrix.
        kept=above_share(FFN // 2),
    ),
    Case(
        "feed-forward, width over two axes",
        lambda: tokens(FeedForward(H)),
        CUBE,
        {"rules": {"batch": "data", "mlp": ("y", "x")}},
        # Half of the batch: outputs and the inputs' gradient over the width; a quarter
        # of the weights' gradients, and that of the scale, over the batch.
        {"all-reduce": 2 * TOKENS // 2 + FFN // 4 + SCALE},
        # Inputs and the outputs' gradient are in 2 parts.
        kept=2 * above_share(TOKENS, 2),
    ),
    Case(
        "feed-forward, FSDP over the batch, width split",
        lambda: tokens(FeedForward(H)),
        GRID,
        {
            "rules": {"batch": "data", "mlp": "model"},
            "fsdp": "data",
            "fsdp_min_bytes": M * H,
        },
        # Each device gathers its half of the matrices, and sums their gradients.
        {
            "all-gather": FFN // 2,
            "all-reduce": 2 * TOKENS // 4 + FFN // 2 + SCALE,
        },
        # Halves of both matrices, and of the gradient of one before its sum; inputs and
        # the outputs' gradient in 4 parts.
        kept=3 * above_share(FFN // 2, 2) + 2 * above_share(TOKENS, 4),
    ),
    Case(
        "feed-forward, FSDP over two axes",
        lambda: tokens(FeedForward(H)),
        GRID,
        {
            "rules": {"batch": ("data", "model")},
            "fsdp": ("data", "model"),
            "fsdp_min_bytes": M * H,
        },
        {"all-gather": FFN, "all-reduce": FFN + SCALE},
        # Both matrices, gathered once, and the gradient of one before its sum.
        kept=3 * above_share(FFN // 2),
    ),
    Case(
        "feed-forward, inputs split by batch and length",
        lambda: tokens(FeedForward(H)),
        GRID,
        {
            "rules": {"batch": "data", "length": "model"},
            "batch_axes": ("batch", "length"),
        },
        # No input is whole, and none is moved.
        {"all-reduce": FFN + SCALE},
        kept=above_share(FFN // 2),
    ),
    Case(
        "attention, length over two axes, ring",
        attention(context_parallel="ring"),
        CUBE,
        {"rules": {"batch": "data", "length": ("x", "y")}},
        # As over one axis of 4 devices, for half of the batch: to each of 3 others, 5
        # arrays and 3 statistics of scores; the gradients go home.
        {
            "collective-permute": 3 * (5 * TOKENS // 8 + 3 * B * 8 * L * 4 // 8)
            + TOKENS // 8,
            "all-reduce": QKVO + SCALE,
        },
        # Keys and values in transit.
        kept=2 * TOKENS // 8,
    ),
    Case(
        "experts over two axes, with the groups",
        lambda: tokens(MoELayer(8, H)),
        GRID,
        {"rules": dict.fromkeys(("batch", "group", "expert"), ("data", "model"))},
        # As over one axis of 8 devices: each expert has room for 2 * S / E tokens.
        {"all-to-all": 4 * 2 * TOKENS // 8, "all-reduce": ROUTER + SCALE},
        # Slots, before and after they are sent.
        kept=2 * TOKENS // 8,
    ),
    Case(
        "experts over two axes, their width over the third",
        lambda: tokens(MoELayer(8, H)),
        CUBE,
        {
            "rules": {
                **dict.fromkeys(("batch", "group", "expert"), ("data", "x")),
                "mlp": "y",
            }
        },
        {
            "all-to-all": 4 * 2 * TOKENS // 4,
            # Outputs of all slots, and the gradient of their inputs, over the width.
            "all-reduce": 2 * 2 * TOKENS // 4 + ROUTER + SCALE,
        },
        # Tokens in 4 parts. So are the slots, and the gradient of their outputs.
        kept=above_share(TOKENS, 4) + 2 * above_share(2 * TOKENS, 4),
    ),
    Case(
        "4 experts on 8 devices, groups over both axes",
        lambda: tokens(MoELayer(4, H)),
        {"data": 2, "x": 4},
        {
            "rules": {
                **dict.fromkeys(("batch", "group"), ("data", "x")),
                "expert": "x",
            }
        },
        # An eighth of the slots there and back, twice, within each half of the devices;
        # the gradients of an expert's matrices over the two devices that have it.
        {
            "all-to-all": 4 * 2 * TOKENS // 8,
            "all-reduce": FFN + ROUTER // 2 + SCALE,
        },
        # The gradient of one matrix of 4 experts.
        kept=above_share(4 * FFN // 2, 4),
    ),
    Case(
        "groups over one axis, experts over the other",
        lambda: tokens(MoELayer(8, H)),
        GRID,
        {"rules": {"batch": "data", "group": "data", "expert": "model"}},
        # A device has the tokens of its experts already. It receives the outputs of all
        # experts' slots, and their inputs' gradient; sums its 4 experts' gradients.
        {
            "all-gather": 2 * 2 * TOKENS // 4,
            "all-reduce": 4 * FFN + ROUTER + SCALE,
        },
        # Inputs; outputs of all slots, which the gates' gradient needs; the gradient of
        # one matrix of the experts.
        kept=above_share(TOKENS, 4)
        + above_share(2 * TOKENS, 4)
        + above_share(8 * FFN // 2, 2),
    ),
    Case(
        "dropless, groups over both axes, experts over one",
        lambda: tokens(MoELayer(8, H, dispatcher="dropless")),
        {"data": 4, "x": 2},
        {
            "rules": {
                **dict.fromkeys(("batch", "group"), ("data", "x")),
                "expert": "x",
            }
        },
        # A quarter more than an even load of choices between two devices that share
        # experts, there and back, twice, and as much in the loops of further rounds,
        # which count once; 4 experts' gradients over the 4 devices that have them.
        {
            "all-to-all": 4 * 2 * 2 * TOKENS // 8 * 5 // 4,
            "all-reduce": 4 * FFN + ROUTER + SCALE,
        },
        # Room for all choices of two devices, twice an equal share: inputs and the
        # outputs' gradient, hidden values and theirs; the gradient of one matrix.
        kept=2 * above_share(2 * TOKENS, 4)
        + 2 * above_share(2 * TOKENS * H // M, 4)
        + above_share(8 * FFN // 2, 2),
    ),
    Case(
        "embedding, vocabulary over two axes",
        lambda: [TokenEmbedding(V, M)],
        CUBE,
        {"rules": {"batch": "data", "vocab": ("x", "y")}},
        # Half of the tokens; the gradient of a quarter of the table.
        {"all-reduce": TOKENS // 2 + V * M * 4 // 4},
        # The outputs' gradient, in 2 parts, and that of the table, in 4.
        kept=above_share(TOKENS, 2) + above_share(V * M * 4, 4),
        x=(B, L),
        y=(B, L, M),
        ids=V,
    ),
    Case(
        "logits and loss, vocabulary over two axes",
        lambda: tokens(VocabularyProjection(V))[:-1],
        CUBE,
        {"rules": {"batch": "data", "vocab": ("x", "y")}},
        {"all-reduce": (3 * LABELS + TOKENS) // 2 + V * M * 4 // 4 + SCALE},
        # Inputs, in 2 parts, and the gradient of the table, in 4.
        kept=above_share(TOKENS, 2) + above_share(V * M * 4, 4),
        y=(B, L),
        loss=TokenCrossentropy,
    ),
]
