"""Ring attention: N devices give what plain attention gives on one."""

import collections

import numpy as np
import parity
import pytest
import tensorflow as tf

import gshard_tf

B, L, N, D = 2, 32, 4, 8


def _arrays(dtype="float32"):
    rng = np.random.default_rng(0)
    qkv = [tf.constant(rng.normal(size=[B, L, N, D]) / 2, dtype) for _ in range(3)]
    ids = tf.constant(np.sort(rng.integers(1, 4, [B, L]), 1), tf.int32)
    return *qkv, ids


def _plain(q, k, v, ids, causal, segments, rate, seed):
    scores = tf.cast(tf.einsum("btnd,blnd->bntl", q, k), tf.float32)
    if segments:
        same = ids[:, None, :, None] == tf.reverse(ids, [1])[:, None, None, :]
        scores = tf.where(same, scores, -1e30)
    if causal:
        past = tf.linalg.band_part(tf.ones([L, L], tf.bool), -1, 0)
        scores = tf.where(past, scores, -1e30)
    weights = tf.nn.softmax(scores)
    if rate:
        kept = gshard_tf.random.uniform(seed, [B, N, L, L]) >= rate
        weights = tf.where(kept, weights / (1 - rate), 0.0)
    return tf.einsum("bntl,blnd->btnd", tf.cast(weights, q.dtype), v)


def _ring(q, k, v, ids, causal, segments, rate, seed):
    # (Some queries see no key at all.)
    pair = (ids, tf.reverse(ids, [1])) if segments else None
    return gshard_tf.ring_attention(q, k, v, causal, pair, rate, seed)


def _gradients(attention, q, k, v, ids, seed, *options):
    with tf.GradientTape() as tape:
        tape.watch([q, k, v])
        y = attention(q, k, v, ids, *options, seed)
        loss = tf.reduce_sum(tf.cast(y, tf.float32) ** 2)
    return y, *tape.gradient(loss, [q, k, v])


CASES = {
    "all": (False, False, 0.0),
    "causal": (True, False, 0.0),
    "masked": (False, True, 0.0),
    "all of it": (True, True, 0.3),
}


@pytest.mark.broad(3)  # the last one has all of them
@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_values_and_gradients_are_those_of_one_device(options):
    arrays = (*_arrays(), tf.constant([3, 5]))
    expected = _gradients(_plain, *arrays, *options)
    rules = gshard_tf.AxisRules({"length": "ring", "heads": "heads"})
    strategy = parity.strategy_of({"heads": 2, "ring": 4}, rules=rules)
    step = tf.function(lambda *arrays: _gradients(_ring, *arrays, *options))
    found = [strategy.run(step, args=arrays)]
    if options[2]:
        found.append(_gradients(_ring, *arrays, *options))  # without a mesh
    for each in found:
        for a, b in zip(each, expected, strict=True):
            assert parity.relative_difference(a, b) < 1e-5


def test_only_keys_and_queries_go_around():
    rules = gshard_tf.AxisRules({"length": "ring"})
    strategy = parity.strategy_of({"ring": 8}, rules=rules)
    *qkv, ids = _arrays()

    @tf.function
    def step(*qkv):
        found = _gradients(_ring, *qkv, ids, None, True, False, 0.0)
        return [tf.reduce_sum(x**2) for x in found]

    strategy.run(step, args=qkv)
    sent = collections.defaultdict(lambda: [0, 0])
    for each in strategy.programs[-1].collectives():
        name = "backward" if "gradient_tape/" in each.op_name else "forward"
        if each.kind != "all-reduce":  # the sums
            part = sent[name, each.kind]
            part[0] += each.runs
            part[1] += each.runs * each.bytes
    shard, statistics = B * L // 8 * N * D, B * L // 8 * N
    assert sent == {
        # Keys and values to each of the 7 others.
        ("forward", "collective-permute"): [7 * 2, 7 * 2 * 4 * shard],
        # Queries, their gradients, those of their outputs, maxima, sums and deltas.
        # Last, the queries' gradients go home.
        ("backward", "collective-permute"): [
            7 * 6 + 1,
            7 * (3 * 4 * shard + 3 * 4 * statistics) + 4 * shard,
        ],
    }


def test_a_dropout_needs_a_seed():
    q, k, v, _ = _arrays()
    with pytest.raises(ValueError, match="`seed` must be given"):
        gshard_tf.ring_attention(q, k, v, dropout=0.1)
