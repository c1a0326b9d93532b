import keras
import numpy as np
import pytest
import tensorflow as tf
from oracles import algorithm1 as oracle

from keras_layers import MultiHeadAttention

N, D, M = 3, 4, 6
RNG = np.random.default_rng(0)
QUERY = RNG.normal(size=(2, 5, M)).astype(np.float32)
MEMORY = RNG.normal(size=(2, 7, M)).astype(np.float32)
QUERY_MASK = np.array([[1, 1, 1, 1, 0], [1, 1, 0, 0, 0]], bool)
MEMORY_MASK = np.array([[1, 1, 1, 1, 1, 0, 0], [1, 0, 1, 0, 0, 0, 0]], bool)


def kernels(layer):
    return [
        kernel.numpy()
        for kernel in (
            layer.query_kernel,
            layer.key_kernel,
            layer.value_kernel,
            layer.output_kernel,
        )
    ]


def test_self_attention_against_oracle_and_keras():
    layer = MultiHeadAttention(N, D)
    outputs = layer(QUERY, mask=QUERY_MASK, causal=True)
    peer = keras.layers.MultiHeadAttention(N, D, use_bias=False)
    peer(QUERY, QUERY)
    peer.set_weights(kernels(layer))
    by_keras = peer(
        QUERY,
        QUERY,
        attention_mask=QUERY_MASK[:, None, :],
        use_causal_mask=True,
    )
    # Padding is replaced by zeros, so nothing is said of its own outputs.
    real = np.asarray(QUERY_MASK)
    np.testing.assert_allclose(outputs[real], by_keras[real], atol=1e-5)
    for b in range(2):
        expected = oracle.attention(
            QUERY[b], QUERY[b], *kernels(layer), memory_mask=QUERY_MASK[b], causal=True
        )
        np.testing.assert_allclose(outputs[b][real[b]], expected[real[b]], atol=1e-5)


def test_cross_attention_against_oracle_and_keras():
    layer = MultiHeadAttention(N, D)
    outputs = layer(QUERY, MEMORY, memory_mask=MEMORY_MASK)
    peer = keras.layers.MultiHeadAttention(N, D, use_bias=False)
    peer(QUERY, MEMORY)
    peer.set_weights(kernels(layer))
    by_keras = peer(QUERY, MEMORY, attention_mask=MEMORY_MASK[:, None, :])
    np.testing.assert_allclose(outputs, by_keras, atol=1e-5)
    for b in range(2):
        expected = oracle.attention(
            QUERY[b], MEMORY[b], *kernels(layer), memory_mask=MEMORY_MASK[b]
        )
        np.testing.assert_allclose(outputs[b], expected, atol=1e-5)


def test_keras_masks_are_used():
    layer = MultiHeadAttention(N, D)
    embedding = keras.layers.Embedding(10, M, mask_zero=True)
    ids = np.array([[1, 2, 3, 0, 0]])
    x = embedding(ids)
    by_hand = layer(tf.identity(x), mask=ids != 0)
    np.testing.assert_allclose(layer(x), by_hand, atol=1e-6)
    query = tf.constant(QUERY[:1])
    by_hand = layer(query, tf.identity(x), memory_mask=ids != 0)
    np.testing.assert_allclose(layer(query, x), by_hand, atol=1e-6)


def test_all_padding_gives_no_nan():
    layer = MultiHeadAttention(N, D)
    assert np.all(np.isfinite(layer(QUERY, mask=np.zeros([2, 5], bool), causal=True)))


@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16"])
def test_decoding_with_a_cache_is_causal_attention(policy):
    keras.config.set_dtype_policy(policy)
    layer = MultiHeadAttention(N, D)
    whole = layer(QUERY, causal=True)
    cache = layer.init_cache(2, 8)
    step = tf.function(layer.decode, jit_compile=True)
    for i in range(5):
        outputs, cache = step(QUERY[:, i : i + 1], cache, tf.constant(i))
        assert outputs.dtype == layer.compute_dtype
        np.testing.assert_allclose(
            tf.cast(outputs[:, 0], tf.float32),
            tf.cast(whole[:, i], tf.float32),
            atol=1e-5 if policy == "float32" else 0.05,
        )
    assert cache["key"].shape == (2, N, 8, D)


def test_projected_memory_is_cross_attention():
    layer = MultiHeadAttention(N, D)
    whole = layer(QUERY, MEMORY, memory_mask=MEMORY_MASK)
    projected = layer.project_memory(tf.constant(MEMORY))
    np.testing.assert_allclose(
        layer.cross_attend(tf.constant(QUERY), projected, MEMORY_MASK), whole, atol=1e-6
    )


def test_dropout_is_for_training():
    layer = MultiHeadAttention(N, D, dropout=0.5)
    np.testing.assert_array_equal(layer(QUERY), layer(QUERY))
    assert np.any(layer(QUERY, training=True) != layer(QUERY))


def test_weights_have_the_scale_of_a_matrix():
    layer = MultiHeadAttention(8, 16, kernel_initializer="lecun_uniform")
    layer.build((None, None, 64))
    np.testing.assert_allclose(np.std(layer.query_kernel), 64**-0.5, rtol=0.05)
    np.testing.assert_allclose(np.std(layer.output_kernel), 128**-0.5, rtol=0.05)


def test_config_and_bad_arguments():
    layer = MultiHeadAttention(N, D, 0.1, kernel_initializer="he_normal", seed=3)
    copy = MultiHeadAttention.from_config(layer.get_config())
    assert copy.get_config() == layer.get_config()
    with pytest.raises(ValueError, match="Received: num_heads=0"):
        MultiHeadAttention(0, 4)
    with pytest.raises(ValueError, match="Received: key_dim='x'"):
        MultiHeadAttention(2, "x")
    with pytest.raises(ValueError, match="causal must be False with memory"):
        layer(QUERY, MEMORY, causal=True)
