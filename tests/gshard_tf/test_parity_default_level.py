"""N devices equal one, compiled as users compile: layers, optimizers and meshes.

All other tests compile quickly and not as users do (see `xla_flags.py`). So each part
runs once more in a process of its own, with XLA's default options.
"""

import pathlib

import pytest
from processes import run_python

MESHES = (
    {"data": 8},
    {"data": 2, "model": 2},
    {"data": 2, "expert": 4},
    {"data": 2, "model": 2, "unused": 2},
)

SETUP = """
import os, sys
sys.path.insert(0, {tests!r})
import keras
import numpy as np
import tensorflow as tf
import gshard_tf
import keras_layers
import parity

gshard_tf.request_cpu_devices(8)
assert "optimization_level" not in os.environ.get("XLA_FLAGS", "")
L = keras.layers
rng = np.random.default_rng(0)
failed = []

def check(name, layers, x, mesh, optimizer=None, rtol=1e-3):
    # Two steps: all weights, slots, metrics and losses.
    def make():
        inputs = L.Input(x.shape[1:], dtype=x.dtype.name)
        return keras.Sequential([inputs, *(layer() for layer in layers)])

    def model():
        made = make()
        chosen = optimizer() if optimizer else keras.optimizers.SGD(0.05, momentum=0.9)
        made.compile(chosen, "mse", metrics=["mae"])
        return made

    def fit(made):
        return made.fit(x, y, batch_size=8, epochs=2, shuffle=False, verbose=0)

    y = rng.normal(size=(8, *make().output_shape[1:])).astype("float32")
    try:
        parity.assert_equal_runs(model, fit, mesh, rtol)
    except Exception as error:
        failed.append(f"{{name}} on {{mesh}}: {{str(error)[:300]}}")

class Twice(L.Layer):
    # A layer of two inputs, given the same one twice.
    def __init__(self, inner, paired=False):
        super().__init__()
        self.inner, self.paired = inner, paired

    def call(self, x, training=None):
        inputs = [(x, x)] if self.paired else [x, x]
        return self.inner(*inputs, training=training)

images = rng.normal(size=[8, 8, 8, 4]).astype("float32")
rows = rng.normal(size=[8, 8, 8]).astype("float32")
ids = rng.integers(1, 20, [8, 6]).astype("int32")
"""
END = """
print("FAILED" if failed else "EQUAL", *failed, sep="\\n")
"""

# Name -> what it is given ("images" [8, 8, 8, 4], "rows" [8, 8, 8] or "ids" [8, 6]),
# and the layers around it, each made anew. A bias that changes nothing has a gradient
# of rounding alone: none is before a normalisation, and attention has none.
KERAS = {
    "convolution": ("images", "lambda: L.Conv2D(8, 3, padding='same')"),
    "strided": ("images", "lambda: L.Conv2D(8, 3, strides=2)"),
    "transposed": ("images", "lambda: L.Conv2DTranspose(4, 3, strides=2)"),
    "convolution of rows": ("rows", "lambda: L.Conv1D(8, 3, padding='causal')"),
    "batch normalization": (
        "images",
        "lambda: L.Conv2D(8, 3, use_bias=False), L.BatchNormalization, "
        "L.GlobalMaxPooling2D",
    ),
    "other normalizations": (
        "images",
        "lambda: L.Dense(8, use_bias=False), L.LayerNormalization, "
        "lambda: L.GroupNormalization(2), L.UnitNormalization",
    ),
    "pooling": (
        "images",
        "lambda: L.Conv2D(8, 3), L.MaxPooling2D, lambda: L.AveragePooling2D(2)",
    ),
    "global pooling": ("rows", "lambda: L.Dense(8), L.GlobalAveragePooling1D"),
    "LSTM": ("rows", "lambda: L.LSTM(8, return_sequences=True), lambda: L.LSTM(8)"),
    "GRU": ("rows", "lambda: L.Bidirectional(L.GRU(8))"),
    "attention": ("rows", "lambda: Twice(L.MultiHeadAttention(2, 4, use_bias=False))"),
    "embedding": ("ids", "lambda: L.Embedding(20, 8)"),
    "activations": ("rows", "lambda: L.Dense(8, 'gelu'), L.PReLU, L.Softmax"),
    "depthwise": ("images", "lambda: L.DepthwiseConv2D(3)"),
    "separable": ("images", "lambda: L.SeparableConv2D(8, 3)"),
    "grouped": ("images", "lambda: L.Conv2D(8, 3, groups=2)"),
}

OURS = {
    "FeedForward": "lambda: K.FeedForward(16)",
    "Dropout": "lambda: L.Dense(8), lambda: K.Dropout(0.3, seed=1)",
    "EncoderBlock": "lambda: K.EncoderBlock(2, 4, 16, dropout=0.1, seed=1)",
    "MultiHeadAttention": "lambda: Twice(K.MultiHeadAttention(2, 4))",
    "DecoderBlock": "lambda: Twice(K.DecoderBlock(2, 4, 16, dropout=0.1, seed=1))",
    "remat": "lambda: K.EncoderBlock(2, 4, 16, num_experts=4, seed=1, remat=True)",
    **{
        f"MoELayer {name} {dispatcher}": "lambda: K.MoELayer(4, 16, seed=1, "
        f"dispatcher={dispatcher!r}, router={router!r})"
        for name, router, dispatcher in [
            ("top2", None, "index"),
            ("top2", None, "einsum"),
            ("top_k", {"kind": "top_k", "k": 1, "jitter": 0.1}, "einsum"),
            ("top_k", {"kind": "top_k", "k": 2}, "index"),
            ("expert choice", {"kind": "expert_choice"}, "index"),
            ("expert choice", {"kind": "expert_choice"}, "einsum"),
            ("bias", {"kind": "top_k", "bias_update_rate": 0.01}, "index"),
        ]
    },
}

# Those that run by default: between them, every part of a block and both dispatchers.
FEW = ("DecoderBlock", "MoELayer top_k einsum", "MoELayer bias index")

_TRANSFORMER = (
    "lambda: Twice(K.Transformer(20, 20, {blocks}, {blocks}, model_dim=8, "
    "hidden_dim=16, num_heads=2, num_experts=4, moe_every=1, dropout=0.1, seed=1, "
    "{more}), paired=True)"
)
# Given ids.
MODELS = {
    "TokenEmbedding": "lambda: K.TokenEmbedding(20, 8)",
    "VocabularyProjection": "lambda: K.TokenEmbedding(20, 8), "
    "lambda: K.VocabularyProjection(20)",
    "Transformer": _TRANSFORMER.format(blocks=1, more=""),
    "stacked": _TRANSFORMER.format(blocks=2, more="stacked=True"),
    "hash router": _TRANSFORMER.format(
        blocks=1, more="moe_options={'router': {'kind': 'hash'}}"
    ),
}

OPTIMIZERS = (
    "Adafactor Adam SGD Lamb Muon RMSprop AdamW Adadelta Adagrad Adamax Nadam Ftrl Lion"
).split()


def run(code):
    """Runs checks in one process, as users compile; fails with those that differ."""
    tests = str(pathlib.Path(__file__).resolve().parent.parent)
    printed = run_python(
        SETUP.format(tests=tests) + "K = keras_layers\n" + code + END,
        timeout=900,
        XLA_FLAGS="",
    )
    assert printed.strip().splitlines()[-1] == "EQUAL", printed


def checks(cases, meshes):
    """One check per case, the meshes in turn."""
    return "".join(
        f"check({name!r}, [{layers}], {given}, {meshes[i % len(meshes)]})\n"
        for i, (name, (given, layers)) in enumerate(cases.items())
    )


def trained_by(count, mesh):
    """One check for each of the first `count` optimizers."""
    return "".join(
        f"check({name!r}, [lambda: L.Dense(8, 'tanh'), lambda: L.Dense(4)],"
        f" rows, {mesh}, keras.optimizers.{name})\n"
        for name in OPTIMIZERS[:count]
    )


@pytest.mark.slow
def test_layers_of_keras():
    run(checks(KERAS, MESHES))


def test_layers_and_optimizers():
    few = {name: ("rows", OURS[name]) for name in FEW}
    convolution = {"convolution": KERAS["convolution"]}
    run(checks({**few, **convolution}, MESHES[1:]) + trained_by(2, MESHES[1]))


@pytest.mark.slow
def test_layers_of_this_package():
    run(checks({name: ("rows", layers) for name, layers in OURS.items()}, MESHES[1:]))


@pytest.mark.slow
def test_models_of_this_package():
    run(checks({name: ("ids", layers) for name, layers in MODELS.items()}, MESHES))


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES[1:2])
def test_optimizers(mesh):
    run(trained_by(len(OPTIMIZERS), mesh))


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES)
def test_all_on_each_mesh(mesh):
    rows = {name: ("rows", layers) for name, layers in OURS.items()}
    run(checks({**KERAS, **rows}, [mesh]))
