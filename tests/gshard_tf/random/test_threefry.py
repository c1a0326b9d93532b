import re
import types

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

import gshard_tf
from gshard_tf import random

WORD = st.integers(0, 2**32 - 1)


def words(*values):
    return tuple(tf.constant(value, tf.uint32) for value in values)


# Random123's kat_vectors (version 1.09), "threefry2x32": rounds, counter, key, result.
@pytest.mark.parametrize(
    ("rounds", "counter", "key", "expected"),
    [
        (13, (0, 0), (0, 0), (0x9D1C5EC6, 0x8BD50731)),
        (13, (2**32 - 1,) * 2, (2**32 - 1,) * 2, (0xFD36D048, 0x2D17272C)),
        (
            13,
            (0x243F6A88, 0x85A308D3),
            (0x13198A2E, 0x03707344),
            (0xBA3E4725, 0xF27D669E),
        ),
        (20, (0, 0), (0, 0), (0x6B200159, 0x99BA4EFE)),
        (20, (2**32 - 1,) * 2, (2**32 - 1,) * 2, (0x1CB996FC, 0xBB002BE7)),
        (
            20,
            (0x243F6A88, 0x85A308D3),
            (0x13198A2E, 0x03707344),
            (0xC4923A9C, 0x483DF7A0),
        ),
    ],
)
def test_known_answers(rounds, counter, key, expected):
    found = random.threefry2x32(words(*key), words(*counter), rounds)
    assert tuple(int(x) for x in found) == expected


@settings(max_examples=50)
@given(key=st.tuples(WORD, WORD), counters=st.lists(st.tuples(WORD, WORD), min_size=1))
def test_threefry_is_jaxs(key, counters):
    from jax.extend.random import threefry_2x32

    counters = np.array(counters, np.uint32)
    ours = random.threefry2x32(words(*key), (counters[:, 0], counters[:, 1]), 20)
    theirs = threefry_2x32(np.array(key, np.uint32), counters.T.reshape(-1))
    np.testing.assert_array_equal(np.concatenate(ours), theirs)


@settings(max_examples=15)
@given(
    seed=st.tuples(WORD, WORD),
    shape=st.lists(st.integers(1, 5), max_size=4),
)
def test_a_number_depends_on_seed_and_position_alone(seed, shape):
    bits = random.random_bits(tf.constant(seed, tf.uint32), shape).numpy()
    assert bits.shape == tuple(shape)
    # Position: the first dimension, and the row-major index within it.
    flat = bits.reshape(shape[0] if shape else 1, -1)
    position = np.indices(flat.shape).astype(np.uint32)
    block = random.threefry2x32(words(*seed), (position[0], position[1]))
    np.testing.assert_array_equal(flat, block[0])
    if shape:
        # So a longer batch begins with the same numbers.
        longer = random.random_bits(
            tf.constant(seed, tf.uint32), [shape[0] + 3, *shape[1:]]
        )
        np.testing.assert_array_equal(longer[: shape[0]], bits)


def test_static_dynamic_and_compiled_shapes_agree():
    seed = tf.constant([3, 5], tf.uint32)
    expected = random.uniform(seed, [4, 6, 5])

    def dynamic(x):
        return random.uniform(seed, [tf.shape(x)[0], 6, tf.shape(x)[1]])

    spec = tf.TensorSpec([None, None])
    x = tf.zeros([4, 5])
    np.testing.assert_array_equal(dynamic(x), expected)
    graph = tf.function(dynamic, input_signature=[spec])
    np.testing.assert_array_equal(graph(x), expected)
    compiled = tf.function(dynamic, input_signature=[spec], jit_compile=True)
    np.testing.assert_array_equal(compiled(x), expected)


@pytest.mark.parametrize("dtype", ["int32", "int64", "uint32"])
def test_takes_seeds_of_any_integer_type(dtype):
    found = random.uniform(tf.constant([3, 5], dtype), [7])
    np.testing.assert_array_equal(found, random.uniform([3, 5], [7]))


@pytest.mark.parametrize("seed", [(0, 0), (1, 2), (2**31 - 1, 77)])
def test_uniform(seed):
    n = 1 << 16
    x = random.uniform(seed, [64, n // 64]).numpy()
    assert x.dtype == np.float32
    assert x.min() >= 0.0 and x.max() < 1.0
    # 16 standard errors of each statistic is what chance all but never does.
    counts, _ = np.histogram(x, bins=64, range=(0, 1))
    chi2 = ((counts - n / 64) ** 2 / (n / 64)).sum()
    assert abs(chi2 - 63) < 6 * np.sqrt(2 * 63)
    assert abs(x.mean() - 0.5) < 6 / np.sqrt(12 * n)
    assert abs(x.var() - 1 / 12) < 6 / np.sqrt(180 * n)
    # Neighbours along either dimension have nothing to do with each other.
    centred = x - 0.5
    for pairs in (centred[1:] * centred[:-1], centred[:, 1:] * centred[:, :-1]):
        assert abs(pairs.mean()) < 6 / 12 / np.sqrt(pairs.size)


def test_seeds_give_unrelated_numbers():
    x = random.uniform([1, 2], [4096]).numpy() - 0.5
    for other in ([2, 1], [1, 3], [0, 2]):
        y = random.uniform(other, [4096]).numpy() - 0.5
        assert abs((x * y).mean()) < 6 / 12 / 64


@pytest.mark.parametrize(
    ("shape", "batch_dim"), [([6, 5], 0), ([4, 6, 5], 1), ([3, 2, 6, 5], 2)]
)
def test_replicas_draw_what_one_device_would(monkeypatch, shape, batch_dim):
    whole = random.uniform([3, 5], shape)
    own = [n // 2 if d == batch_dim else n for d, n in enumerate(shape)]
    parts, same = [], []
    for replica in range(2):
        context = types.SimpleNamespace(
            num_replicas_in_sync=2, replica_id_in_sync_group=replica
        )
        monkeypatch.setattr(tf.distribute, "get_replica_context", lambda c=context: c)
        parts.append(random.uniform([3, 5], own, batch_dim))
        same.append(random.uniform([3, 5], own, batch_dim=None))
    np.testing.assert_array_equal(tf.concat(parts, batch_dim), whole)
    np.testing.assert_array_equal(*same)


# -- partitioned ---------------------------------------------------------------------

BATCH, LENGTH, WIDTH = 16, 24, 40


def dropout_on(mesh, axes=("batch", None, None)):
    """Dropout's mask of a batch, and the strategy it was made on."""
    strategy = gshard_tf.SpmdStrategy(gshard_tf.create_mesh(mesh))

    @tf.function
    def run(x, seed):
        def step(x, seed):
            x = gshard_tf.annotate(x, axes)
            keep = random.uniform(seed, tf.unstack(tf.shape(x)))
            # Sums over the other dimensions, so that no mask has to be gathered.
            return tf.reduce_sum(tf.where(keep < 0.5, x, 0.0), axis=[1, 2])

        return strategy.run(step, args=(x, seed))

    x = np.random.default_rng(0).normal(size=[BATCH, LENGTH, WIDTH]).astype("float32")
    return run(x, np.array([7, 9], np.int32)), strategy


@pytest.mark.parametrize(
    ("shape", "batch_dim", "rows"),
    [([8, 3, 2], 0, 1), ([3, 8, 2], 1, 1), ([3, 24], 1, 3)],
)
def test_a_microbatch_draws_its_rows_of_the_batch(shape, batch_dim, rows):
    seed = tf.constant([5, 7])
    whole = random.uniform(seed, shape, batch_dim).numpy()
    part = [n // 4 if i == batch_dim else n for i, n in enumerate(shape)]
    for number in range(4):
        with random.microbatch(tf.constant(number), 4):
            drawn = random.uniform(seed, part, batch_dim, rows=rows)
        examples = np.arange(number, 8, 4)[:, None] * rows + np.arange(rows)
        expected = np.take(whole, examples.ravel(), batch_dim)
        np.testing.assert_array_equal(drawn, expected)


def test_same_numbers_on_any_number_of_partitions():
    one, _ = dropout_on({"data": 1})
    for partitions in (2, 8):
        many, _ = dropout_on({"data": partitions})
        np.testing.assert_allclose(many, one, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("mesh", "axes"),
    [
        ({"data": 8}, ("batch", None, None)),
        ({"data": 4, "model": 2}, ("batch", None, "mlp")),
    ],
)
def test_each_device_makes_only_its_own_part(mesh, axes):
    _, strategy = dropout_on(mesh, axes)
    [program] = strategy.programs
    text = program.compiled.as_text()
    # Every array of bits in the compiled program, and its number of elements.
    sizes = {
        match: int(np.prod([int(d) for d in match.split(",")]))
        for match in re.findall(r"\b[su]\d+\[([\d,]+)\]", text)
    }
    assert max(sizes.values()) == BATCH * LENGTH * WIDTH // 8, sizes
    assert "rng" not in text
    assert "all-gather" not in text


def test_tensorflows_own_generator_would_make_the_global_tensor():
    # What `counter_rng` is for. If this fails after an upgrade, it may retire.
    strategy = gshard_tf.SpmdStrategy(gshard_tf.create_mesh({"data": 8}))

    @tf.function
    def run(x):
        def step(x):
            x = gshard_tf.annotate(x, ("batch", None, None))
            keep = tf.random.stateless_uniform(tf.shape(x), [7, 9])
            return tf.reduce_sum(tf.where(keep < 0.5, x, 0.0), axis=[1, 2])

        return strategy.run(step, args=(x,))

    run(np.zeros([BATCH, LENGTH, WIDTH], "float32"))
    [program] = strategy.programs
    sizes = [
        int(np.prod([int(d) for d in match.split(",")]))
        for match in re.findall(
            r"\b(?:f|s|u|pred)\d*\[([\d,]+)\]", program.compiled.as_text()
        )
    ]
    assert max(sizes) >= BATCH * LENGTH * WIDTH
