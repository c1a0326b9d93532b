"""Dropout, feed-forward, embeddings and positions."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_layers import (
    Dropout,
    Experts,
    FeedForward,
    MultiHeadAttention,
    TokenEmbedding,
    VocabularyProjection,
)
from keras_layers.embedding import sinusoids


def test_dropout_drops_its_share_and_keeps_the_mean():
    layer = Dropout(0.25, seed=1)
    x = tf.ones([100, 200])
    outputs = layer(x, training=True).numpy()
    np.testing.assert_allclose(np.unique(outputs), [0, 1 / 0.75], rtol=1e-6)
    np.testing.assert_allclose(np.mean(outputs == 0), 0.25, atol=0.01)
    assert np.any(layer(x, training=True) != outputs)
    np.testing.assert_array_equal(layer(x), x)
    np.testing.assert_array_equal(Dropout(0.25, seed=1)(x, training=True), outputs)
    with tf.GradientTape() as tape:
        tape.watch(x)
        y = layer(x, training=True)
    np.testing.assert_array_equal(tape.gradient(y, x), y)


def test_dropout_noise_shape():
    x = tf.ones([5, 7, 50])
    outputs = Dropout(0.5, noise_shape=(None, 1, None), seed=1)(x, training=True)
    assert np.all(outputs == outputs[:, :1])
    assert len(np.unique(outputs)) == 2
    with pytest.raises(ValueError, match=r"Received: noise_shape=\(1,\)"):
        Dropout(0.5, noise_shape=(1,))(x, training=True)


@pytest.mark.parametrize("rate", [1, -0.1, True, None])
def test_dropout_bad_rate(rate):
    with pytest.raises(ValueError, match=f"Received: rate={rate}"):
        Dropout(rate)


def test_dropout_in_a_model(tmp_path):
    model = keras.Sequential([keras.Input([None, 4]), Dropout(0.5, (None, 1, None), 3)])
    model.save(tmp_path / "model.keras")
    copy = keras.saving.load_model(tmp_path / "model.keras")
    assert copy.layers[0].get_config() == model.layers[0].get_config()
    x = tf.ones([2, 3, 4], tf.bfloat16)
    assert Dropout(0.5, dtype="bfloat16")(x, training=True).dtype == tf.bfloat16


def test_feed_forward():
    layer = FeedForward(7, activation="gelu", seed=1)
    x = np.random.default_rng(0).normal(size=(2, 3, 5)).astype(np.float32)
    hidden = keras.activations.gelu(x @ layer_weight(layer, x, "wi"))
    np.testing.assert_allclose(layer(x), hidden @ layer.wo.numpy(), atol=1e-5)
    copy = FeedForward.from_config(layer.get_config())
    assert copy.get_config() == layer.get_config()
    with pytest.raises(ValueError, match="Received: hidden_dim=0"):
        FeedForward(0)


def layer_weight(layer, x, name):
    layer.build(x.shape)
    return getattr(layer, name).numpy()


def test_embedding_and_its_dense_gradient():
    layer = TokenEmbedding(6, 4)
    ids = tf.constant([[1, 5, 1], [0, 0, 2]])
    with tf.GradientTape() as tape:
        embedded = layer(ids)
        loss = tf.reduce_sum(embedded * tf.range(6.0)[:, None][:3][None])
    table = layer.table.numpy()
    np.testing.assert_allclose(embedded, 2.0 * table[ids.numpy()], rtol=1e-6)
    gradient = tape.gradient(loss, layer.table.value)
    assert isinstance(gradient, tf.Tensor)
    # Weights 0, 1, 2 by position, times the scale of 2.
    expected = 2.0 * np.array([1.0, 2.0, 2.0, 0.0, 0.0, 1.0])[:, None] * np.ones(4)
    np.testing.assert_allclose(gradient, expected)
    np.testing.assert_allclose(
        layer.project(embedded), embedded.numpy() @ table.T, rtol=1e-5
    )


def test_logits_are_float32():
    keras.config.set_dtype_policy("mixed_bfloat16")
    x = tf.ones([1, 2, 4], tf.bfloat16)
    table = TokenEmbedding(6, 4)
    table.build()
    assert table.project(x).dtype == tf.float32
    projection = VocabularyProjection(6)
    assert projection(x).dtype == tf.float32
    symbolic = projection(keras.Input([None, 4]))
    assert symbolic.dtype == "float32" and symbolic.shape == (None, None, 6)


def test_sinusoids():
    encoding = sinusoids(tf.range(50), 9).numpy()
    assert encoding.shape == (50, 9)
    np.testing.assert_allclose(encoding[0], [0, 0, 0, 0, 1, 1, 1, 1, 0])
    np.testing.assert_allclose(encoding[:, 0], np.sin(np.arange(50)), atol=1e-5)
    np.testing.assert_allclose(encoding[:, 7], np.cos(np.arange(50) / 1e4), atol=1e-5)
    np.testing.assert_allclose(sinusoids(tf.constant([7]), 9)[0], encoding[7])


def test_weights_that_share_an_initializer_do_not_start_equal():
    attention = MultiHeadAttention(2, 4)
    attention.build((None, None, 8))
    gated = FeedForward(8, gated=True)
    gated.build((None, None, 8))
    experts = Experts(2, 8, gated=True)
    experts.build((2, None, None, 8))
    for weights in (
        [attention.query_kernel, attention.key_kernel, attention.value_kernel],
        [gated.wi, gated.wi_gate, gated.wo],
        [experts.wi, experts.wi_gate, experts.wo],
    ):
        values = [np.array(weight) for weight in weights]
        for i, one in enumerate(values):
            for other in values[:i]:
                assert abs(np.corrcoef(one.ravel(), other.ravel())[0, 1]) < 0.5
