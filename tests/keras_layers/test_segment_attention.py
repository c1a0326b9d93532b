"""Attention within segments, layer by layer: each segment sees itself alone."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import algorithm1 as oracle

from keras_layers import DecoderBlock, EncoderBlock, MultiHeadAttention
from keras_layers._segments import segment_starts, token_positions


def naive(layer, inputs, memory, segments, memory_segments, mask, memory_mask, causal):
    """Attention of each segment alone, over arrays that hold nothing else."""
    kernels = [
        w.numpy()
        for w in (
            layer.query_kernel,
            layer.key_kernel,
            layer.value_kernel,
            layer.output_kernel,
        )
    ]
    expected = np.full(inputs.shape, np.nan, np.float32)
    for b in range(len(inputs)):
        for name in set(segments[b]) - {0}:
            at = (segments[b] == name) & mask[b]
            seen = (memory_segments[b] == name) & memory_mask[b]
            if not seen.any():
                expected[b, at] = 0.0
                continue
            expected[b, at] = oracle.attention(
                inputs[b, at], memory[b, seen], *kernels, causal=causal
            )
    return expected


@pytest.mark.parametrize("kind", ["self", "causal", "cross"])
@settings(max_examples=10)
@given(
    length=st.sampled_from([1, 4, 7]),
    names=st.integers(1, 4),
    masked=st.booleans(),
    remat=st.booleans(),
    dtype=st.sampled_from(["int32", "int64", "uint8"]),
    seed=st.integers(0, 2**31),
)
def test_attention_against_an_oracle(kind, length, names, masked, remat, dtype, seed):
    """Segments in any order and in pieces, some without keys, NaN in padding."""
    rng = np.random.default_rng(seed)
    layer = MultiHeadAttention(2, 3, seed=1, remat=remat)
    sides, known = [], []
    for size in (length, 5 if kind == "cross" else length):
        x = rng.normal(size=(2, size, 4)).astype("float32")
        segments = rng.integers(0, names + 1, (2, size)).astype(dtype)
        mask = rng.random((2, size)) < (0.7 if masked else 2)
        known.append((x, segments, mask))
        hidden = ~mask | (segments == 0)
        sides.append((np.where(hidden[..., None], np.float32(np.nan), x), mask))
    (x, mask), (memory, memory_mask) = sides
    (clean, segments, _), (clean_memory, memory_segments, _) = known
    arguments = {"mask": mask if masked else None, "segment_ids": segments}
    if kind == "cross":
        arguments.update(
            memory=memory,
            memory_mask=memory_mask if masked else None,
            memory_segment_ids=memory_segments,
        )
    else:
        clean_memory, memory_segments, memory_mask = clean, segments, mask
    outputs = layer(x, causal=kind == "causal", training=True, **arguments).numpy()
    expected = naive(
        layer,
        clean,
        clean_memory,
        segments,
        memory_segments,
        mask,
        memory_mask,
        kind == "causal",
    )
    real = mask & (segments != 0)
    np.testing.assert_allclose(outputs[real], expected[real], rtol=1e-4, atol=1e-5)
    assert np.all(np.isfinite(outputs))


@settings(max_examples=20)
@given(st.lists(st.tuples(st.integers(0, 3), st.booleans()), min_size=1, max_size=12))
def test_positions_and_starts(tokens):
    names, mask = (np.array(part) for part in zip(*tokens, strict=True))
    positions = token_positions(tf.constant(mask[None]), tf.constant(names[None]))[0]
    starts = segment_starts(names[None], tf.constant(names[None]))[0]
    for t, name in enumerate(names):
        before = [i for i in range(t) if names[i] == name]
        assert positions[t] == sum(mask[i] for i in before)
        assert starts[t] == (not before)


@pytest.mark.parametrize("make", [EncoderBlock, DecoderBlock])
@pytest.mark.parametrize("remat", [False, True])
def test_blocks(make, remat):
    options = {"router": {"kind": "top_k", "capacity_factor": "dropless"}}
    block = make(2, 4, 8, 4, dropout=0.0, moe_options=options, seed=0, remat=remat)
    rng = np.random.default_rng(0)
    x, memory = rng.normal(size=(2, 1, 9, 6)).astype("float32")
    segments = np.array([[7, 7, 7, 2, 2, 0, 0, 4, 4]])
    memory_segments = np.array([[2, 7, 7, 4, 4, 4, 4, 0, 0]])
    decodes = make is DecoderBlock
    arguments = {"segment_ids": segments}
    if decodes:
        arguments.update(memory=memory, memory_segment_ids=memory_segments)
    outputs = block(x, training=True, **arguments).numpy()
    for name in (7, 2, 4):
        at = segments[0] == name
        alone = {"memory": memory[:, memory_segments[0] == name]} if decodes else {}
        expected = block(x[:, at], training=True, **alone)
        np.testing.assert_allclose(outputs[:, at], expected, rtol=1e-4, atol=1e-5)


def test_a_functional_model_of_attention():
    x, memory = keras.Input([None, 6]), keras.Input([5, 6])
    ids, memory_ids = (
        keras.Input([None], dtype="int32"),
        keras.Input([5], dtype="int32"),
    )
    layer = MultiHeadAttention(2, 4)
    outputs = layer(x, memory, segment_ids=ids, memory_segment_ids=memory_ids)
    assert outputs.shape == (None, None, 6)
    model = keras.Model([x, memory, ids, memory_ids], outputs)
    rng = np.random.default_rng(0)
    values = [rng.normal(size=(2, n, 6)).astype("float32") for n in (3, 5)]
    names = [rng.integers(0, 3, (2, n)) for n in (3, 5)]
    expected = layer(*values, segment_ids=names[0], memory_segment_ids=names[1])
    np.testing.assert_allclose(model([*values, *names]), expected, atol=1e-6)


def test_bad_segments():
    x = np.zeros([2, 4, 6], "float32")
    names = np.ones([2, 4], int)
    layer = MultiHeadAttention(2, 4)
    one_only = "both or not at all. Received: segment_ids only"
    for call, message in (
        (lambda: layer(x, segment_ids=names[0]), r"shape \(4,\), dtype int64"),
        (lambda: layer(x, segment_ids=names[:, :3]), r"shape \(2, 3\), dtype int64"),
        (lambda: layer(x, segment_ids=names * 1.0), "dtype float32"),
        (lambda: layer(x, segment_ids=names > 0), "dtype bool"),
        (lambda: layer(x, x, segment_ids=names), one_only),
        (
            lambda: layer(x, x, memory_segment_ids=names),
            "Received: memory_segment_ids only",
        ),
        (
            lambda: layer(x, segment_ids=names, memory_segment_ids=names),
            "memory_segment_ids must be None without memory",
        ),
        (
            lambda: layer(x, x, segment_ids=names, memory_segment_ids=names[:, :1]),
            r"memory_segment_ids must be integers.*shape \(2, 1\)",
        ),
        (lambda: DecoderBlock(2, 4, 8)(x, x, segment_ids=names), one_only),
        (lambda: EncoderBlock(2, 4, 8)(x, segment_ids=names * 1.0), "dtype float32"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
