"""A Transformer that gets its labels returns statistics; it trains as with logits."""

import functools

import keras
import numpy as np
import pytest
from parity import assert_close, run_on_mesh, run_plain

import gshard_tf
from gshard_tf.hlo import parser
from keras_layers import (
    NegativeLogLikelihood,
    TokenAccuracy,
    TokenCrossentropy,
    Transformer,
    token_statistics,
)

WORDS, B, L, T = 400, 8, 5, 9


def batch():
    rng = np.random.default_rng(0)
    source, target = rng.integers(1, WORDS, (B, L)), rng.integers(1, WORDS, (B, T))
    source[::2, 4:] = target[::2, 6:] = 0
    labels = np.pad(target[:, 1:], [[0, 0], [0, 1]])
    return source, target, labels


def transformer(block=None, tied=True, labels=True):
    model = Transformer(
        WORDS,
        WORDS,
        1,
        1,
        model_dim=8,
        hidden_dim=8,
        num_heads=2,
        dropout=0.0,
        tie_output=tied,
        block_length=block,
        seed=0,
    )
    options = {"ignore_class": 0, "from_statistics": labels}
    model.compile(
        keras.optimizers.SGD(0.5),
        TokenCrossentropy(label_smoothing=0.1, z_loss=1e-3, **options),
        weighted_metrics=[NegativeLogLikelihood(**options), TokenAccuracy(**options)],
    )
    model.build([(None, None), (None, None)])
    return model


def train(model, labels=True):
    source, target, following = batch()
    inputs = {"source": source, "target": target}
    if labels:
        inputs["labels"] = following
    history = model.fit(inputs, following, batch_size=B, epochs=2, verbose=0)
    return {name: values[-1] for name, values in history.history.items()}


@functools.cache
def trained(block, tied, labels):
    """A run on one device, of which several tests read."""
    return run_plain(
        lambda: transformer(block, tied, labels), lambda model: train(model, labels)
    )


@pytest.mark.parametrize(
    ("block", "tied"), [(4, True), (4, False), (None, True)], ids=str
)
def test_training_is_that_with_logits(block, tied):
    right, found = trained(None, tied, False), trained(block, tied, True)
    assert set(found.result) == {"loss", "nll", "token_accuracy"}
    assert found.result == pytest.approx(right.result, rel=1e-5)
    pairs = zip(found.model.weights, right.model.weights, strict=True)
    for one, other in pairs:
        assert_close(one, other, 1e-5, other.path)


def test_on_a_mesh_logits_never_exist_whole():
    found = run_on_mesh(
        lambda: transformer(4),
        train,
        {"data": 2, "model": 2},
        rules=gshard_tf.AxisRules({"batch": "data", "vocab": "model"}),
    )
    assert found.result == pytest.approx(trained(4, True, True).result, rel=1e-5)
    (program,) = found.strategy.programs
    module = parser.parse(program.compiled.as_text())
    largest = max(
        array.elements
        for instruction, _, _ in module.executed()
        for array in instruction.arrays
    )
    # A device's part of the logits would have a quarter of all.
    assert largest < B * T * WORDS // 4


def test_statistics_have_the_shape_and_mask_that_the_model_says(tmp_path):
    source, target, labels = batch()
    model = transformer(4)
    inputs = {"source": source, "target": target, "labels": labels}
    symbolic = {k: keras.Input(v.shape[1:], dtype="int32") for k, v in inputs.items()}
    assert model(symbolic).shape == (None, T, 4)
    shapes = {name: array.shape for name, array in inputs.items()}
    assert model.compute_output_shape(shapes) == (B, T, 4)
    packed = model(inputs)
    logits = model((source, target))
    right = np.stack(token_statistics(labels, logits), -1)
    np.testing.assert_allclose(packed, right, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(keras.src.backend.get_keras_mask(packed), target != 0)
    model.save(tmp_path / "m.keras")
    again = keras.models.load_model(tmp_path / "m.keras")
    assert again.block_length == 4
    np.testing.assert_array_equal(again(inputs), packed)


def test_bad_labels():
    source, target, labels = batch()
    with pytest.raises(ValueError, match=r"Labels must .* Received: shape \(8, 8\)"):
        transformer(4)({"source": source, "target": target, "labels": labels[:, 1:]})
    with pytest.raises(ValueError, match="block_length=0"):
        transformer(0)
