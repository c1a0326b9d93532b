"""The loss and metrics of tokens against NumPy in float64 and against Keras's own."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_layers import (
    NegativeLogLikelihood,
    Perplexity,
    TokenAccuracy,
    TokenCrossentropy,
    token_statistics,
)

V = 37


def samples(seed=0, shape=(4, 6), scale=3.0):
    rng = np.random.default_rng(seed)
    logits = rng.normal(scale=scale, size=(*shape, V)).astype(np.float32)
    labels = rng.integers(0, V, shape)
    best = rng.random(shape) < 0.4  # or hardly a label is correct
    labels[best] = logits.argmax(-1)[best]
    return labels, logits


def oracle(labels, logits, smoothing=0.0, z_loss=0.0):
    """Losses and their gradient, as the formulas say, in float64."""
    logits = logits.astype(np.float64)
    log_z = np.log(np.exp(logits).sum(-1))
    target = np.full(logits.shape, smoothing / V)
    np.put_along_axis(target, labels[..., None], 1 - smoothing + smoothing / V, -1)
    losses = -(target * (logits - log_z[..., None])).sum(-1) + z_loss * log_z**2
    softmax = np.exp(logits - log_z[..., None])
    return losses, softmax - target + 2 * z_loss * log_z[..., None] * softmax


def value_and_gradient(loss, labels, logits, weights=None, mask=None):
    logits = tf.constant(logits)
    with tf.GradientTape() as tape:
        tape.watch(logits)
        predicted = tf.identity(logits)
        if mask is not None:
            predicted._keras_mask = tf.constant(mask)
        value = loss(labels, predicted, weights)
    return value.numpy(), tape.gradient(value, logits).numpy()


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("z_loss", [0.0, 1e-2])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_values_and_gradients_of_the_formulas(smoothing, z_loss, compiled):
    labels, logits = samples()
    loss = TokenCrossentropy(smoothing, z_loss, reduction=None)

    def both(labels, logits):
        with tf.GradientTape() as tape:
            tape.watch(logits)
            losses = loss(labels, logits)
        return losses, tape.gradient(losses, logits)

    if compiled:
        both = tf.function(both, jit_compile=True, autograph=False)
    for found, right in zip(
        both(tf.constant(labels), tf.constant(logits)),
        oracle(labels, logits, smoothing, z_loss),
        strict=True,
    ):
        np.testing.assert_allclose(found, right, rtol=1e-6, atol=2e-6)


WEIGHTS = np.random.default_rng(5).random((4, 6)).astype(np.float32)
MASK = np.random.default_rng(6).random((4, 6)) < 0.7


@pytest.mark.parametrize("reduction", ["sum_over_batch_size", "sum", "none"])
@pytest.mark.parametrize("mask", [None, MASK], ids=["whole", "masked"])
@pytest.mark.parametrize("weights", [None, WEIGHTS], ids=["even", "weighted"])
@pytest.mark.parametrize("ignore_class", [None, 3, -1])
def test_keras_own_loss(ignore_class, weights, mask, reduction):
    labels, logits = samples(1)
    if ignore_class is not None:
        labels[::2, 1::2] = ignore_class
    options = {"ignore_class": ignore_class, "reduction": reduction}
    keras_loss = keras.losses.SparseCategoricalCrossentropy(True, **options)
    right = value_and_gradient(keras_loss, labels, logits, weights, mask)
    found = value_and_gradient(
        TokenCrossentropy(**options), labels, logits, weights, mask
    )
    np.testing.assert_allclose(found[0], right[0], rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(found[1], right[1], rtol=1e-5, atol=1e-6)


def test_smoothing_of_keras():
    labels, logits = samples(2)
    smooth = keras.losses.CategoricalCrossentropy(True, label_smoothing=0.2)
    right = value_and_gradient(smooth, np.eye(V)[labels], logits)
    found = value_and_gradient(TokenCrossentropy(0.2), labels, logits)
    np.testing.assert_allclose(found[0], right[0], rtol=1e-6)
    np.testing.assert_allclose(found[1], right[1], rtol=1e-5, atol=1e-6)


def with_mask(logits, mask):
    logits = tf.identity(logits)
    if mask is not None:
        logits._keras_mask = tf.constant(mask)
    return logits


@pytest.mark.parametrize("mask", [None, MASK], ids=["whole", "masked"])
@pytest.mark.parametrize("weights", [None, WEIGHTS], ids=["even", "weighted"])
def test_keras_own_metrics(weights, mask):
    pairs = [
        (
            NegativeLogLikelihood(),
            keras.metrics.SparseCategoricalCrossentropy(from_logits=True),
        ),
        (TokenAccuracy(), keras.metrics.SparseCategoricalAccuracy()),
    ]
    perplexity = Perplexity()
    for batch in range(3):
        labels, logits = samples(10 + batch)
        logits = with_mask(logits, mask)
        perplexity.update_state(labels, logits, weights)
        for ours, theirs in pairs:
            ours.update_state(labels, logits, weights)
            theirs.update_state(labels, logits, weights)
    for ours, theirs in pairs:
        np.testing.assert_allclose(ours.result(), theirs.result(), rtol=1e-6)
    assert 0.2 < pairs[1][0].result() < 0.9
    np.testing.assert_allclose(
        perplexity.result(), np.exp(pairs[0][1].result()), rtol=1e-5
    )


def test_metrics_with_a_class_to_ignore():
    labels, logits = samples(3)
    labels[:, 4:] = -1
    weights = WEIGHTS * (labels >= 0)
    right = oracle(np.maximum(labels, 0), logits)[0]
    nll, accuracy = (
        kind(ignore_class=-1) for kind in (NegativeLogLikelihood, TokenAccuracy)
    )
    for metric in (nll, accuracy):
        metric.update_state(labels, logits, WEIGHTS)
    share = (weights * (logits.argmax(-1) == labels)).sum() / weights.sum()
    np.testing.assert_allclose(
        nll.result(), (right * weights).sum() / weights.sum(), rtol=1e-6
    )
    np.testing.assert_allclose(accuracy.result(), share, rtol=1e-6)
    # Weights of sentences, and a mask that Keras attaches.
    nll.reset_state()
    sentences = np.array([1.0, 0.0, 2.0, 0.5], np.float32)
    nll.update_state(labels, with_mask(logits, MASK), sentences)
    weights = sentences[:, None] * (labels >= 0) * MASK
    np.testing.assert_allclose(
        nll.result(), (right * weights).sum() / weights.sum(), rtol=1e-6
    )


def test_the_first_of_equal_logits_is_the_prediction():
    # Logits of low precision are often equal.
    rng = np.random.default_rng(4)
    logits = rng.integers(0, 3, (50, 8, V)).astype(np.float32)
    logits[:5] = 1.0
    labels = rng.integers(0, 6, (50, 8))
    right = logits.argmax(-1) == labels
    found = token_statistics(labels, logits).correct
    np.testing.assert_array_equal(found, right)
    theirs = keras.metrics.sparse_categorical_accuracy(labels, logits)
    np.testing.assert_array_equal(found, theirs)
    assert 0.1 < right.mean() < 0.9


def test_logits_of_any_size():
    labels, logits = samples(7, scale=1e4)
    logits[0, 0, :5] = -np.inf  # a class that may not be
    labels[0, 0] = 9
    logits[1, 1] = -np.inf
    logits[1, 1, labels[1, 1]] = 0.0  # all classes but one
    right = keras.losses.SparseCategoricalCrossentropy(True, reduction=None)
    found = TokenCrossentropy(reduction=None)(labels, logits)
    assert np.isfinite(found).all()
    np.testing.assert_allclose(found, right(labels, logits), rtol=1e-6)


def test_a_label_without_a_logit_is_not_a_number():
    _, logits = samples(8, (3,))
    losses = TokenCrossentropy(reduction=None)([0, V, -1], logits)
    assert np.isnan(losses).tolist() == [False, True, True]


def test_low_precision_is_computed_in_float32():
    keras.config.set_dtype_policy("mixed_bfloat16")
    labels, logits = samples(9)
    rounded = tf.cast(logits, tf.bfloat16)
    losses = TokenCrossentropy(0.1, reduction=None)(labels, rounded)
    assert losses.dtype == tf.float32
    right = oracle(labels, tf.cast(rounded, tf.float32).numpy(), 0.1)[0]
    np.testing.assert_allclose(losses, right, rtol=1e-6)
    metric = NegativeLogLikelihood()
    metric.update_state(labels[..., None], rounded)
    right = oracle(labels, tf.cast(rounded, tf.float32).numpy())[0].mean()
    np.testing.assert_allclose(metric.result(), right, rtol=1e-6)


def test_a_second_derivative():
    labels, logits = samples(11, (3,))
    loss = TokenCrossentropy(reduction="sum")
    logits = tf.constant(logits)
    with tf.GradientTape() as outer:
        outer.watch(logits)
        with tf.GradientTape() as tape:
            tape.watch(logits)
            value = loss(labels, logits)
        gradient = tape.gradient(value, logits)
        along = tf.reduce_sum(gradient * logits)
    found = outer.gradient(along, logits) - gradient
    p = np.exp(logits - tf.reduce_logsumexp(logits, -1, keepdims=True))
    right = p * (logits - (p * logits).numpy().sum(-1, keepdims=True))
    np.testing.assert_allclose(found, right, atol=1e-5)


def test_configs():
    loss = TokenCrossentropy(0.1, 1e-4, ignore_class=0, reduction="sum", name="ce")
    again = keras.losses.deserialize(keras.losses.serialize(loss))
    assert again.get_config() == loss.get_config()
    assert type(again) is TokenCrossentropy and again.z_loss == 1e-4
    for kind in (NegativeLogLikelihood, Perplexity, TokenAccuracy):
        metric = kind(name="m", ignore_class=2)
        again = keras.metrics.deserialize(keras.metrics.serialize(metric))
        assert type(again) is kind and again.get_config() == metric.get_config()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"label_smoothing": 1.0}, r"label_smoothing must be in \[0, 1\)"),
        ({"z_loss": -1.0}, "z_loss must be a number, at least 0"),
    ],
)
def test_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        TokenCrossentropy(**options)


def test_shapes():
    with pytest.raises(ValueError, match="one dimension more than labels"):
        token_statistics(np.zeros([2, 3]), np.zeros([2, 5]))
    with pytest.raises(ValueError, match="last dimension of logits must be known"):
        token_statistics(np.zeros([2]), np.zeros([2, 0]))


def test_callbacks_know_what_is_better():
    labels, logits = samples(12)
    model = keras.Sequential([keras.Input([6, V]), keras.layers.Dense(V)])
    model.compile(
        "sgd",
        TokenCrossentropy(),
        weighted_metrics=[NegativeLogLikelihood(), Perplexity(), TokenAccuracy()],
    )
    for monitor in ("val_nll", "val_perplexity", "val_token_accuracy"):
        stop = keras.callbacks.EarlyStopping(monitor)
        model.fit(
            logits,
            labels,
            validation_data=(logits, labels),
            callbacks=[stop],
            verbose=0,
        )
        greater = stop.monitor_op(2.0, 1.0)
        assert bool(greater) == (monitor == "val_token_accuracy")
