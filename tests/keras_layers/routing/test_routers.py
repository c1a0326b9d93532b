"""Every router against a slow one, and through every dispatcher."""

import itertools

import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import routers as oracle
from oracles.algorithm1 import softmax
from routings import check, choices_of, logits_of

from keras_layers import (
    ExpertChoiceRouter,
    ExpertChoiceRouting,
    Top2Router,
    TopKRouter,
)
from keras_layers.moe.dispatch import EinsumDispatcher, IndexDispatcher
from keras_layers.routing import top2_assignment


def masks(rng, groups, tokens, padded):
    if not padded:
        return np.ones((groups, tokens), bool)
    real = rng.random((groups, tokens)) < 0.7
    real[0] = False
    return real


SIZES = {
    "tokens": st.integers(1, 12),
    "experts": st.integers(2, 6),
    "capacity": st.integers(1, 8),
    "padded": st.booleans(),
    "ties": st.booleans(),
    "seed": st.integers(0, 2**31),
}


@settings(max_examples=50)
@given(
    **SIZES,
    policy=st.sampled_from(["random", "all", "threshold"]),
    threshold=st.sampled_from([0.2, 0.5, 1.0]),
    legacy=st.booleans(),
    drop_frees_slot=st.booleans(),
)
def test_top2_conventions(
    tokens, experts, capacity, padded, ties, seed, policy, threshold, legacy,
    drop_frees_slot,
):  # fmt: skip
    rng = np.random.default_rng(seed)
    gates = softmax(logits_of(seed, 4, tokens, experts, ties)).astype(np.float32)
    real = masks(rng, 4, tokens, padded)
    uniforms = rng.random((4, tokens)).astype(np.float32)
    routing = top2_assignment(
        tf.constant(gates),
        capacity,
        tf.constant(real),
        tf.constant(uniforms),
        drop_frees_slot,
        policy=policy,
        threshold=threshold,
        legacy_mtf_behavior=legacy,
    )
    check(
        routing,
        [
            oracle.top2(
                gates[g],
                capacity,
                real=real[g],
                uniforms=uniforms[g],
                policy=policy,
                threshold=threshold,
                legacy=legacy,
                drop_frees_slot=drop_frees_slot,
            )
            for g in range(4)
        ],
    )


def test_sampling_draws_the_second_expert_by_its_gate():
    gates = np.tile(np.array([0.5, 0.3, 0.15, 0.05], np.float32), (1, 20_000, 1))
    rng = np.random.default_rng(0)
    routing = top2_assignment(
        tf.constant(gates),
        20_000,
        uniforms=tf.constant(rng.random(gates.shape).astype(np.float32)),
        policy="sampling",
    )
    first, second = np.moveaxis(routing.expert_index.numpy()[0], -1, 0)
    assert np.all(first == 0)
    shares = np.bincount(second, minlength=4) / len(second)
    np.testing.assert_allclose(shares, [0, 0.6, 0.3, 0.1], atol=0.015)
    # The weights are those of the two that were chosen.
    weight = gates[0, 0, second] / (0.5 + gates[0, 0, second])
    np.testing.assert_allclose(routing.weight[0, :, 1], weight, rtol=1e-5)


@settings(max_examples=20)
@given(
    **SIZES,
    k=st.integers(1, 3),
    scores=st.sampled_from(["softmax", "sigmoid"]),
    normalize=st.booleans(),
    prioritized=st.booleans(),
    biased=st.booleans(),
)
def test_top_k(
    tokens, experts, capacity, padded, ties, seed, k, scores, normalize, prioritized,
    biased,
):  # fmt: skip
    k = min(k, experts)
    router = TopKRouter(
        experts,
        k,
        scores=scores,
        normalize_weights=normalize,
        batch_prioritized=prioritized,
        bias_update_rate=0.1 if biased else 0.0,
    )
    router.build((None, None, 3))
    rng = np.random.default_rng(seed)
    if biased:
        router.bias.assign(rng.normal(size=experts))
    logits = logits_of(seed, 3, tokens, experts, ties)
    real = masks(rng, 3, tokens, padded)
    routing, _, _ = router.route(tf.constant(logits), capacity, tf.constant(real), None)
    values = tf.nn.softmax(logits) if scores == "softmax" else tf.sigmoid(logits)
    values = values.numpy()
    ranked = values + router.bias.numpy() if biased else values
    check(
        routing,
        [
            oracle.top_k(
                values[g],
                ranked[g],
                k,
                capacity,
                real=real[g],
                normalize=normalize,
                prioritized=prioritized,
            )
            for g in range(3)
        ],
    )


@settings(max_examples=20)
@given(**SIZES)
def test_expert_choice(tokens, experts, capacity, padded, ties, seed):
    router = ExpertChoiceRouter(experts)
    logits = logits_of(seed, 3, tokens, experts, ties)
    real = masks(np.random.default_rng(seed), 3, tokens, padded)
    capacity = min(capacity, tokens)
    routing, gates, _ = router.route(
        tf.constant(logits), capacity, tf.constant(real), None
    )
    gates = gates.numpy()
    check(
        routing,
        [oracle.expert_choice(gates[g], capacity, real=real[g]) for g in range(3)],
    )


ALL = {
    "top2": lambda: Top2Router(4, second_expert_policy="all"),
    "top2 tight": lambda: Top2Router(4, 0.7, second_expert_policy="threshold",
                                     second_expert_threshold=0.3),
    "top2 not legacy": lambda: Top2Router(4, 1.0, legacy_mtf_behavior=False),
    "switch": lambda: TopKRouter(4, 1, 1.25),
    "top 3": lambda: TopKRouter(4, 3, 2.0, scores="sigmoid"),
    "prioritized": lambda: TopKRouter(4, 2, 1.0, batch_prioritized=True),
    "dropless": lambda: TopKRouter(4, 2, "dropless"),
    "masked": lambda: Top2Router(4, masked_experts=[1]),
    "expert choice": lambda: ExpertChoiceRouter(4),
    "expert choice, much": lambda: ExpertChoiceRouter(4, 4.0),
}  # fmt: skip


@pytest.mark.broad(19)  # top2, and the choice of experts, compiled
@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("name", ALL)
def test_dispatchers_and_a_loop_agree(name, jit):
    """In values and in all gradients, for every router, with padding."""
    rng = np.random.default_rng(3)
    x = tf.constant(rng.normal(size=(2, 10, 6)).astype(np.float32))
    mask = tf.constant(rng.random((2, 10)) < 0.8)
    wi = tf.constant(rng.normal(size=(4, 6, 7)).astype(np.float32))
    wo = tf.constant(rng.normal(size=(4, 7, 6)).astype(np.float32))
    target = tf.constant(rng.normal(size=(2, 10, 6)).astype(np.float32))
    router = ALL[name]()
    router.build((None, None, 6))

    def experts(buffers):
        hidden = tf.tanh(tf.einsum("EGCM,EMH->EGCH", buffers, wi))
        return tf.einsum("EGCH,EHM->EGCM", hidden, wo)

    def by(dispatcher):
        def run():
            with tf.GradientTape() as tape:
                tape.watch([x, wi, wo])
                routing, _ = router(x, mask=mask)
                y = dispatcher.combine(
                    experts(dispatcher.dispatch(x, routing)), routing
                )
                loss = tf.reduce_sum(y * target)
            return y, tape.gradient(loss, [x, wi, wo, router.kernel.value])

        if jit:
            run = tf.function(run, jit_compile=True, autograph=False)
        return run()

    def by_loop():
        with tf.GradientTape() as tape:
            tape.watch([x, wi, wo])
            routing, _ = router(x, mask=mask)
            rows = []
            for g, s in itertools.product(range(2), range(10)):
                row = tf.zeros([6])
                for (token, e, c), _ in choices_of(routing, g).items():
                    if token == s:
                        if isinstance(routing, ExpertChoiceRouting):
                            weight = routing.weight[g, e, c]
                        else:
                            k = routing.expert_index[g, s].numpy().tolist().index(e)
                            weight = routing.weight[g, s, k]
                        hidden = tf.tanh(tf.linalg.matvec(wi[e], x[g, s], True))
                        row += weight * tf.linalg.matvec(wo[e], hidden, True)
                rows.append(row)
            y = tf.reshape(tf.stack(rows), [2, 10, 6])
            loss = tf.reduce_sum(y * target)
        return y, tape.gradient(loss, [x, wi, wo, router.kernel.value])

    expected = tf.nest.flatten(by_loop())
    assert np.abs(expected[-1]).max() > 0
    for dispatcher in (IndexDispatcher(), EinsumDispatcher()):
        for a, b in zip(tf.nest.flatten(by(dispatcher)), expected, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_no_token_is_lost_without_dropping():
    x = tf.ones([1, 32, 5])  # all alike: all want the same experts
    for router in (TopKRouter(8, 2, "dropless"), Top2Router(8, "dropless")):
        routing, _ = router(x, training=True)
        assert routing.capacity == 32
        assert np.all(routing.dispatched[..., 0])
    lossy, _ = Top2Router(8, "dropless", eval_capacity_factor=0.5)(x)
    assert lossy.capacity == 2


def test_the_gradient_of_expert_choice_is_tensorflows():
    rng = np.random.default_rng(0)
    logits = tf.Variable(rng.normal(size=[2, 9, 4]).astype("float32"))
    factor = rng.normal(size=[2, 4, 3]).astype("float32")
    router = ExpertChoiceRouter(4)
    with tf.GradientTape(persistent=True) as tape:
        routing = router.route(logits, 3, None, True)[0]
        ours = tf.reduce_sum(routing.weight * factor)
        gates = tf.transpose(tf.nn.softmax(logits), [0, 2, 1])  # [G, E, S]
        weight, token_index = tf.math.top_k(gates, 3)
        theirs = tf.reduce_sum(weight * factor)
    np.testing.assert_array_equal(routing.token_index, token_index)
    # Tokens that an expert did not take have no part in it.
    np.testing.assert_allclose(
        tape.gradient(ours, logits), tape.gradient(theirs, logits), rtol=1e-5, atol=1e-7
    )


def test_switch_loss_is_1_at_balance_and_e_at_collapse():
    router = TopKRouter(4, 1)
    even = tf.constant(np.eye(4, dtype=np.float32)[np.arange(8) % 4][None] * 50)
    assert float(router.route(even, 2, None, None)[2]) == pytest.approx(1.0)
    one = tf.constant(np.eye(4, dtype=np.float32)[np.zeros(8, int)][None] * 50)
    assert float(router.route(one, 2, None, None)[2]) == pytest.approx(4.0)
    # Whatever K is: each of a token's choices counts 1 / K.
    pairs = np.eye(4) + np.eye(4)[[1, 2, 3, 0]]
    even = tf.constant(pairs[np.arange(8) % 4][None] * 50, tf.float32)
    router = TopKRouter(4, 2)
    assert float(router.route(even, 4, None, None)[2]) == pytest.approx(1.0)


@pytest.mark.parametrize("name", ALL)
def test_routers_come_back_from_their_config(name):
    router = ALL[name]()
    again = keras.saving.deserialize_keras_object(
        keras.saving.serialize_keras_object(router)
    )
    assert type(again) is type(router) and again.get_config() == router.get_config()
