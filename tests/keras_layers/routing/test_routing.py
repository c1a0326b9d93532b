"""The router against the sequential Algorithm 1 of `oracles/algorithm1.py`."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import algorithm1 as oracle

from keras_layers.routing import (
    Top2Router,
    expert_capacity,
    load_balancing_loss,
    top2_assignment,
)


def random_gates(rng, groups, tokens, experts, kind):
    """Softmax outputs `[G, S, E]` float32: plain, with ties, or all to one expert."""
    logits = rng.normal(size=(groups, tokens, experts))
    if kind == "ties":
        logits = rng.integers(0, 2, size=logits.shape).astype(float)
    elif kind == "equal":
        logits = np.zeros_like(logits)
    elif kind == "one_expert":
        logits[..., experts // 2] += 20.0
    elif kind == "skewed":
        logits = 2.0 * logits + 3.0 * rng.normal(size=experts)
    return oracle.softmax(logits.astype(np.float32)).astype(np.float32)


def check_against_oracle(gates, capacity, mask, uniforms, drop_frees_slot):
    """Compares all groups; returns how many dispatches there were."""
    routing = top2_assignment(
        tf.constant(gates),
        capacity,
        None if mask is None else tf.constant(mask),
        None if uniforms is None else tf.constant(uniforms),
        drop_frees_slot,
    )
    expert_index, slot, weight, dispatched = (x.numpy() for x in routing[:4])
    losses = []
    for g in range(gates.shape[0]):
        expected = oracle.algorithm1(
            gates[g],
            capacity,
            uniforms=None if uniforms is None else uniforms[g],
            real=None if mask is None else mask[g],
            drop_frees_slot=drop_frees_slot,
        )
        got = {
            (s, int(expert_index[g, s, k])): (int(slot[g, s, k]), weight[g, s, k])
            for s, k in zip(*np.nonzero(dispatched[g]), strict=True)
        }
        assert len(got) == dispatched[g].sum()
        wanted = {(s, int(e)): (c, w) for s, e, c, w in expected.choices}
        assert {key: value[0] for key, value in got.items()} == {
            key: value[0] for key, value in wanted.items()
        }
        for key, (_, w) in wanted.items():
            np.testing.assert_allclose(got[key][1], w, atol=1e-6)
        np.testing.assert_array_equal(expert_index[g, :, 0], expected.first)
        np.testing.assert_array_equal(expert_index[g, :, 1], expected.second)
        if mask is None or mask[g].any():
            losses.append(expected.aux_loss)
    assert np.all(weight[~dispatched] == 0)
    assert np.all(slot[~dispatched] == -1)
    loss = load_balancing_loss(
        tf.constant(gates),
        routing.expert_index[..., 0],
        None if mask is None else tf.constant(mask),
    )
    np.testing.assert_allclose(loss, np.mean(losses) if losses else 0.0, atol=1e-6)
    return int(dispatched.sum())


@pytest.mark.parametrize("drop_frees_slot", [False, True])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("kind", ["plain", "ties", "equal", "one_expert", "skewed"])
def test_thousands_of_groups_match_algorithm_1(kind, padded, drop_frees_slot):
    rng = np.random.default_rng(len(kind))
    for groups, tokens, experts, capacity in (
        (60, 16, 4, 8),
        (60, 16, 4, 2),
        (40, 7, 5, 1),
        (40, 5, 8, 2),
        (20, 1, 3, 1),
        (5, 70, 6, 24),
    ):
        gates = random_gates(rng, groups, tokens, experts, kind)
        mask = None
        if padded:
            mask = rng.random((groups, tokens)) < rng.random((groups, 1))
            mask[0] = False
        uniforms = rng.random((groups, tokens)).astype(np.float32)
        assert check_against_oracle(gates, capacity, mask, uniforms, drop_frees_slot)


@settings(max_examples=25, deadline=None)
@given(
    tokens=st.integers(1, 12),
    experts=st.integers(2, 6),
    capacity=st.integers(1, 12),
    kind=st.sampled_from(["plain", "ties", "equal", "one_expert", "skewed"]),
    padded=st.booleans(),
    policy=st.sampled_from(["random", "all"]),
    drop_frees_slot=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_any_sizes_match_algorithm_1(
    tokens, experts, capacity, kind, padded, policy, drop_frees_slot, seed
):
    rng = np.random.default_rng(seed)
    gates = random_gates(rng, 8, tokens, experts, kind)
    mask = rng.random((8, tokens)) < 0.6 if padded else None
    uniforms = None
    if policy == "random":
        uniforms = rng.random((8, tokens)).astype(np.float32)
    check_against_oracle(gates, capacity, mask, uniforms, drop_frees_slot)


def test_the_two_readings_of_line_22_differ():
    rng = np.random.default_rng(0)
    gates = random_gates(rng, 50, 32, 8, "skewed")
    uniforms = rng.random((50, 32)).astype(np.float32)
    literal = check_against_oracle(gates, 6, None, uniforms, False)
    freed = check_against_oracle(gates, 6, None, uniforms, True)
    every = check_against_oracle(gates, 6, None, None, False)
    assert literal < freed < every


def test_first_choices_go_before_second_choices():
    # Token 0 wants expert 1 second; tokens 1 and 2 want it first and fill it.
    gates = tf.constant([[[0.6, 0.4], [0.1, 0.9], [0.2, 0.8]]])
    routing = top2_assignment(gates, capacity=2)
    np.testing.assert_array_equal(
        routing.dispatched[0], [[True, False], [True, True], [True, False]]
    )
    np.testing.assert_array_equal(routing.slot[0], [[0, -1], [0, 1], [1, -1]])


def test_compiled_and_op_by_op_agree():
    rng = np.random.default_rng(3)
    gates = random_gates(rng, 4, 50, 6, "ties")
    uniforms = rng.random((4, 50)).astype(np.float32)

    def route(g, u):
        return top2_assignment(g, 9, None, u)[:4]

    eager = route(tf.constant(gates), tf.constant(uniforms))
    compiled = tf.function(route, jit_compile=True)(gates, uniforms)
    for a, b in zip(eager, compiled, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_equal_gates_share_the_gradient_of_neither():
    gates = tf.Variable([[[0.25, 0.25, 0.25, 0.25]]])
    with tf.GradientTape() as tape:
        weight = top2_assignment(gates, 1).weight[0, 0, 0]
    # d g1 / (g1 + g2): 1 / (4 * 0.25) for the first expert, its negative for the
    # second, nothing for the others.
    np.testing.assert_allclose(tape.gradient(weight, gates)[0, 0], [1, -1, 0, 0])


@pytest.mark.parametrize(
    ("tokens", "experts", "factor", "least", "capacity"),
    [
        (1024, 512, 2.0, 1, 4),  # 2S/E, as in the paper
        (2048, 2048, 2.0, 1, 2),
        (50, 11, 1.1, 1, 5),  # 50 * 1.1 / 11 is above 5 in floating point
        (10, 4, 1.25, 1, 4),  # 3.125, rounded up
        (3, 8, 2.0, 1, 1),  # fewer tokens than experts
        (1, 2, 2.0, 1, 1),  # never more than there are tokens
        (8, 2, 100.0, 1, 8),
        (64, 64, 1.0, 4, 4),
        (2, 64, 1.0, 4, 2),
    ],
)
def test_capacity(tokens, experts, factor, least, capacity):
    assert expert_capacity(tokens, experts, factor, least) == capacity
    dynamic = expert_capacity(tf.constant(tokens), experts, factor, least)
    assert int(dynamic) == capacity


def test_aux_loss_at_balance_and_at_collapse():
    experts = 4
    even = tf.constant(np.eye(experts, dtype=np.float32)[None])
    chosen = tf.argmax(even, axis=-1, output_type=tf.int32)
    np.testing.assert_allclose(load_balancing_loss(even, chosen), 1 / experts**2)
    collapsed = tf.constant(np.eye(experts, dtype=np.float32)[[[1] * 8]])
    chosen = tf.ones([1, 8], tf.int32)
    np.testing.assert_allclose(load_balancing_loss(collapsed, chosen), 1 / experts)


def test_aux_loss_gradient_flows_through_mean_gate_only():
    gates = tf.Variable(random_gates(np.random.default_rng(0), 1, 6, 3, "plain"))
    with tf.GradientTape() as tape:
        first = tf.argmax(gates, axis=-1, output_type=tf.int32)
        loss = load_balancing_loss(gates, first)
    count = np.bincount(first.numpy()[0], minlength=3)
    # d/dg[s, e] of (1/E) sum_e (c_e/S) (1/S) sum_s g[s, e].
    expected = np.broadcast_to(count / (3 * 6 * 6), (6, 3))
    np.testing.assert_allclose(tape.gradient(loss, gates)[0], expected, rtol=1e-5)


def test_router_scales_aux_loss_by_convention():
    x = np.random.default_rng(0).normal(size=(2, 8, 5)).astype(np.float32)
    lingvo = Top2Router(4, seed=1, kernel_initializer="ones")
    paper = Top2Router(4, seed=1, kernel_initializer="ones", aux_loss_scale="paper")
    scaled = 16 * paper(x)[1].aux_loss
    np.testing.assert_allclose(lingvo(x)[1].aux_loss, scaled, rtol=1e-6)


def test_router_is_float32_under_any_policy():
    for policy in ("mixed_bfloat16", "bfloat16", "mixed_float16"):
        keras.config.set_dtype_policy(policy)
        router = Top2Router(2)
        routing, (aux_loss, *_) = router(tf.zeros([1, 1000, 4], tf.bfloat16))
        assert router.kernel.dtype == "float32"
        assert routing.weight.dtype == aux_loss.dtype == tf.float32
        # All to expert 0, in order: bfloat16 could not count above 256.
        np.testing.assert_array_equal(routing.slot[0, :, 0], np.arange(1000))


def test_random_routing_keeps_second_choice_with_twice_its_weight():
    router = Top2Router(2, capacity_factor=4.0, seed=7)
    x = tf.constant([[[0.0]] * 4000, [[1.0]] * 4000])
    router.build(x.shape)
    router.kernel.assign([[1.0, 0.0]])
    routing, _ = router(x, training=True)
    share = tf.reduce_mean(tf.cast(routing.dispatched[..., 1], tf.float32), axis=1)
    second = 1 / (1 + np.e)
    np.testing.assert_allclose(share, [1.0, 2 * second], atol=0.02)
    again, _ = router(x, training=True)
    assert np.any(again.dispatched != routing.dispatched)
    # Deterministic, and all of them, when evaluating.
    for _ in range(2):
        assert np.all(router(x, training=False)[0].dispatched)
    assert np.all(
        Top2Router(2, 4.0, second_expert_policy="all")(x, training=True)[0][3]
    )


def test_evaluation_has_its_own_capacity():
    router = Top2Router(4, capacity_factor=1.0, eval_capacity_factor=2.0)
    x = tf.zeros([1, 8, 3])
    assert router(x, training=True)[0].capacity == 2
    assert router(x, training=False)[0].capacity == 4
    assert Top2Router(4, capacity_factor=1.0)(x, training=False)[0].capacity == 2


def test_unknown_sizes_route_as_known_ones():
    router = Top2Router(4, capacity_factor=1.25, second_expert_policy="all")
    x = tf.random.stateless_normal([3, 40, 5], [1, 2])
    mask = tf.random.stateless_uniform([3, 40], [3, 4]) < 0.8
    known, (loss, *_) = router(x, mask=mask)

    @tf.function(
        input_signature=[
            tf.TensorSpec([None, None, 5]),
            tf.TensorSpec([None, None], tf.bool),
        ]
    )
    def route(x, mask):
        routing, (loss, *_) = router(x, mask=mask, training=True)
        return routing[:4], routing.capacity, loss

    unknown, capacity, unknown_loss = route(x, mask)
    assert int(capacity) == known.capacity == 13
    np.testing.assert_allclose(loss, unknown_loss, rtol=1e-6)
    for a, b in zip(known[:4], unknown, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_experts": 1}, "num_experts=1"),
        ({"num_experts": 2.0}, "num_experts=2.0"),
        ({"num_experts": 4, "capacity_factor": 0}, "capacity_factor=0"),
        ({"num_experts": 4, "capacity_factor": -1.0}, "capacity_factor=-1.0"),
        ({"num_experts": 4, "eval_capacity_factor": 0.0}, "eval_capacity_factor=0.0"),
        ({"num_experts": 4, "min_capacity": 0}, "min_capacity=0"),
        ({"num_experts": 4, "second_expert_policy": "some"}, "'some'"),
        ({"num_experts": 4, "aux_loss_scale": "other"}, "'other'"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=f"Received: .*{message}"):
        Top2Router(**arguments)


def test_config_round_trip():
    router = Top2Router(
        8,
        capacity_factor=1.25,
        eval_capacity_factor=2.0,
        min_capacity=4,
        second_expert_policy="all",
        drop_frees_slot=True,
        aux_loss_scale="paper",
        seed=3,
        kernel_initializer="zeros",
        name="gate",
    )
    copy = keras.saving.deserialize_keras_object(
        keras.saving.serialize_keras_object(router)
    )
    assert copy.get_config() == router.get_config()
