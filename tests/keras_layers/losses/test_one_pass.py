"""The passes over the vocabulary of a compiled training step, read off its text."""

import keras
import numpy as np
import pytest
from installed_versions import JAX

import gshard_tf
from gshard_tf.hlo import parser
from keras_layers import (
    NegativeLogLikelihood,
    TokenAccuracy,
    TokenCrossentropy,
    TokenEmbedding,
    VocabularyProjection,
)

V, T, B, M = 64, 8, 16, 12
VOCAB = gshard_tf.AxisRules({"vocab": "model"})


def ours():
    loss = TokenCrossentropy(0.1, 1e-3, ignore_class=0)
    return loss, [NegativeLogLikelihood(), TokenAccuracy()]


def of_keras():
    loss = keras.losses.SparseCategoricalCrossentropy(True, ignore_class=0)
    nll = keras.metrics.SparseCategoricalCrossentropy(from_logits=True, name="nll")
    return loss, [nll, keras.metrics.SparseCategoricalAccuracy(name="token_accuracy")]


def train(axes, rules=None, make_loss=ours):
    """The logs of two steps, and the step's program."""
    keras.utils.set_random_seed(0)
    strategy = gshard_tf.SpmdStrategy(gshard_tf.create_mesh(axes), rules)
    with strategy.scope():
        ids = keras.Input([T], dtype="int32")
        x = keras.layers.Dense(M, activation="tanh")(TokenEmbedding(V, M)(ids))
        model = keras.Model(ids, VocabularyProjection(V)(x))
        loss, metrics = make_loss()
        model.compile(keras.optimizers.SGD(0.1), loss, weighted_metrics=metrics)
    ids = np.random.default_rng(0).integers(0, V, (B, T))
    labels = np.roll(ids, 1, 1)
    history = model.fit(ids, labels, batch_size=B, epochs=2, verbose=0).history
    (program,) = strategy.programs
    return history, program


def passes(program, opcode, size):
    """How many instructions read or give `[..., size]` of an opcode."""
    module = parser.parse(program.compiled.as_text())
    count = 0
    for instruction, computation, times in module.executed():
        if instruction.opcode != opcode:
            continue
        shapes = instruction.arrays
        if opcode == "reduce":
            shapes = computation[instruction.operands[0]].arrays
        if any(len(a.dims) > 1 and a.dims[-1] == size for a in shapes):
            count += times
    return count


@pytest.fixture(scope="module")
def on_one_device():
    return train({"data": 1})


def test_one_exponential_for_loss_gradient_and_metrics(on_one_device):
    program = on_one_device[1]
    assert passes(program, "exponential", V) == 1
    # The maximum, the sum of exponentials, the sum for the smoothing. (Equal logits
    # before the label's are searched in windows, not a reduction of this size.)
    if JAX >= (0, 10):  # an older compiler splits them
        assert passes(program, "reduce", V) == 3
    program = train({"data": 1}, make_loss=of_keras)[1]
    assert passes(program, "exponential", V) == 2


@pytest.mark.parametrize(
    ("axes", "rules", "parts"),
    [
        ({"data": 8}, None, 1),
        ({"data": 2, "model": 4}, None, 4),
        ({"model": 8}, VOCAB, 8),
    ],
    ids=["tokens", "both", "vocabulary"],
)
def test_logits_stay_where_they_are(on_one_device, axes, rules, parts):
    history, program = train(axes, rules)
    assert passes(program, "exponential", V // parts) == 1
    found = program.collectives()
    assert {collective.kind for collective in found} == {"all-reduce"}
    # The largest are the gradients of weights, and embeddings of the tokens.
    tokens = B // axes.get("data", 1) * T
    weights = 4 * (2 * V * M + M * M + M)
    assert max(c.bytes for c in found) < weights + 4 * tokens
    assert all(c.bytes != 4 * tokens * V // parts for c in found)
    for name, values in on_one_device[0].items():
        np.testing.assert_allclose(history[name], values, rtol=1e-5, err_msg=name)


def test_metrics_are_those_of_keras():
    right, found = (train({"data": 2}, None, each)[0] for each in (of_keras, ours))
    # The first step begins with the same weights, the second does not.
    for name in ("nll", "token_accuracy"):
        np.testing.assert_allclose(found[name][0], right[name][0], rtol=1e-6)
