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

from keras_layers import (
    ExpertChoiceRouter,
    ExpertChoiceRouting,
    HashRouter,
    MoELayer,
    Top2Router,
    TopKRouter,
)
from keras_layers.moe.dispatch import EinsumDispatcher, IndexDispatcher
from keras_layers.routing import ROUTERS, router_z_loss, top2_assignment


def logits_of(seed, groups, tokens, experts, ties=False):
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(groups, tokens, experts)) * 2
    return (np.round(logits) if ties else logits).astype(np.float32)


def choices_of(routing, g):
    """The dispatches of group g: `{(token, expert, slot): weight}`."""
    found = {}
    if isinstance(routing, ExpertChoiceRouting):
        index, weight = routing.token_index.numpy()[g], routing.weight.numpy()[g]
        for e, c in zip(*np.nonzero(index >= 0), strict=True):
            found[int(index[e, c]), int(e), int(c)] = weight[e, c]
        chosen = {(s, e) for s, e, _ in found}
        assert chosen == set(zip(*np.nonzero(routing.chosen.numpy()[g]), strict=True))
        return found
    expert, slot, weight, dispatched = (x.numpy()[g] for x in routing[:4])
    for s, k in zip(*np.nonzero(dispatched), strict=True):
        found[int(s), int(expert[s, k]), int(slot[s, k])] = weight[s, k]
    assert len(found) == dispatched.sum()
    return found


def check(routing, expected):
    for g, choices in enumerate(expected):
        found = choices_of(routing, g)
        wanted = {(s, e, c): w for s, e, c, w in choices}
        assert found.keys() == wanted.keys()
        for key, weight in wanted.items():
            np.testing.assert_allclose(found[key], weight, atol=1e-6)


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
@given(
    groups=st.integers(1, 4),
    size=st.integers(2, 4),
    allowed=st.integers(1, 4),
    score=st.sampled_from(["max", "top2"]),
    biased=st.booleans(),
    ties=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_groups_of_experts(groups, size, allowed, score, biased, ties, seed):
    experts, allowed = groups * size, min(allowed, groups)
    router = TopKRouter(
        experts,
        2,
        scores="sigmoid",
        score_bias=biased,
        weight_scale=2.5,
        num_expert_groups=groups,
        expert_groups_per_token=allowed,
        expert_group_score=score,
    )
    router.build((None, None, 3))
    bias = np.zeros(experts, np.float32)
    if biased:
        bias = np.random.default_rng(seed).normal(size=experts).astype(np.float32)
        router.bias.assign(bias)
    logits = logits_of(seed, 3, 7, experts, ties)
    routing, _, _ = router.route(tf.constant(logits), 7, None, True)
    if biased:
        np.testing.assert_array_equal(router.bias, bias)  # without a rate it stays
    values = tf.sigmoid(logits).numpy()
    best = {"max": 1, "top2": 2}[score]
    check(
        routing,
        [
            [
                (s, e, slot, 2.5 * weight)
                for s, e, slot, weight in oracle.top_k(
                    values[g],
                    oracle.within_groups(values[g] + bias, groups, allowed, best),
                    2,
                    7,
                    real=np.ones(7, bool),
                    normalize=True,
                    prioritized=False,
                )
            ]
            for g in range(3)
        ],
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_expert_groups": 3}, "must be a multiple of num_expert_groups"),
        ({"num_expert_groups": 2, "expert_groups_per_token": 3}, "at most num_expert"),
        ({"num_expert_groups": 8, "expert_groups_per_token": 1}, "must have k experts"),
        (
            {
                "num_expert_groups": 8,
                "expert_groups_per_token": 2,
                "expert_group_score": "top2",
            },
            "two experts or more",
        ),
        ({"num_expert_groups": 2, "masked_experts": [1]}, "masked_experts must be"),
        ({"bias_update_rate": 0.1, "score_bias": False}, "must be 0 without"),
        ({"weight_scale": 0.0}, "weight_scale must be above 0"),
    ],
)
def test_options_of_top_k_that_do_not_fit(options, message):
    with pytest.raises(ValueError, match=message):
        TopKRouter(8, 2, **options)


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


@pytest.mark.broad(3)
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


def test_bias_balances_without_a_loss():
    router = TopKRouter(8, 2, scores="sigmoid", bias_update_rate=0.02, seed=1)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(4, 64, 16)).astype(np.float32) + rng.normal(size=16)
    first, _ = router(x, training=True)
    step = tf.function(lambda: router(x, training=True)[0].capacity, autograph=False)
    for _ in range(150):
        step()
    last, _ = router(x, training=False)
    before = router.bias.numpy().copy()
    router(x, training=False)
    np.testing.assert_array_equal(router.bias, before)

    def busiest(routing):
        load = routing.load(None).numpy()
        return load.max() / load.mean()

    assert busiest(first) > 1.5
    assert busiest(last) < 1.15


def test_bias_counts_in_choosing_and_not_in_weights():
    router = TopKRouter(3, 1, bias_update_rate=0.1)
    router.build((None, None, 2))
    router.bias.assign([0.0, 0.0, 1.0])
    logits = tf.constant([[[2.0, 1.0, 0.0]]])
    routing, gates, _ = router.route(logits, 1, None, None)
    assert routing.expert_index[0, 0, 0] == 2
    np.testing.assert_allclose(routing.weight[0, 0, 0], gates[0, 0, 2])


def test_masked_experts_get_nothing():
    for router in (
        Top2Router(4, masked_experts=[0, 3]),
        TopKRouter(4, 2, scores="sigmoid", masked_experts=[0, 3], bias_update_rate=1.0),
        ExpertChoiceRouter(4, masked_experts=[0, 3]),
    ):
        x = np.random.default_rng(0).normal(size=(2, 9, 5)).astype(np.float32)
        routing, report = router(x, training=True)
        routing, report = router(x, training=True)
        load = routing.load(None).numpy()
        assert np.all(load[[0, 3]] == 0) and np.all(load[[1, 2]] > 0)
        assert np.isfinite(report.z_loss)


def test_hash_routes_by_id_alone_and_evenly():
    router = HashRouter(8, "dropless")
    ids = np.arange(8000).reshape(1, -1)
    routing, _ = router(tf.zeros([1, 8000, 4]), token_ids=ids)
    load = routing.load(None).numpy()
    assert load.min() > 900 and load.max() < 1100
    again, _ = router(tf.ones([1, 8000, 4]), token_ids=ids[:, ::-1])
    np.testing.assert_array_equal(again.expert_index[:, ::-1], routing.expert_index)
    other, _ = HashRouter(8, "dropless", seed=1)(tf.zeros([1, 8000, 4]), token_ids=ids)
    assert np.mean(other.expert_index == routing.expert_index) < 0.3
    with pytest.raises(ValueError, match="token_ids=None"):
        MoELayer(8, 4, router={"kind": "hash"})(tf.zeros([1, 4, 4]))


def test_jitter_cap_and_z_loss():
    x = np.random.default_rng(0).normal(size=(2, 50, 6)).astype(np.float32)
    plain = TopKRouter(4, 1, seed=3)
    plain.build(x.shape)
    noisy = TopKRouter(4, 1, jitter=0.3, seed=3)
    noisy.build(x.shape)
    noisy.kernel.assign(plain.kernel)
    calm = plain(x, training=True)[0].weight
    np.testing.assert_array_equal(noisy(x, training=False)[0].weight, calm)
    assert np.any(noisy(x, training=True)[0].weight != calm)

    plain.kernel.assign(plain.kernel * 100.0)
    capped = TopKRouter(4, 1, logit_cap=5.0)
    capped.build(x.shape)
    capped.kernel.assign(plain.kernel)
    loud, quiet = plain(x)[1], capped(x)[1]
    assert loud.z_loss > 1000 and quiet.z_loss < (5 + np.log(4)) ** 2
    assert loud.confidence > quiet.confidence
    logits = np.einsum("gsm,me->gse", x, plain.kernel.numpy())
    mask = np.arange(50)[None] < [[20], [0]]
    expected = np.mean(np.log(np.exp(logits.astype("float64")).sum(-1))[mask] ** 2)
    np.testing.assert_allclose(
        router_z_loss(tf.constant(logits), tf.constant(mask)), expected, rtol=1e-4
    )


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


class Logits(TopKRouter):
    """Keeps what it routes by."""

    def route(self, logits, *args, **kwargs):
        self.seen = logits.numpy()
        return super().route(logits, *args, **kwargs)


def test_jitter_is_around_1():
    router = Logits(4, 1, jitter=0.3, seed=3)
    router.build([None, None, 4])
    router.kernel.assign(np.eye(4))
    router(tf.ones([4, 500, 4]), training=True)  # so that logits are the jitter
    assert 0.7 <= router.seen.min() < 0.71 and 1.29 < router.seen.max() <= 1.3
    assert abs(router.seen.mean() - 1.0) < 0.01


def test_a_cap_is_a_scaled_tanh():
    x = np.random.default_rng(0).normal(size=(2, 50, 4)).astype(np.float32) * 9
    router = Logits(4, 1, logit_cap=5.0)
    router.build(x.shape)
    router.kernel.assign(np.eye(4))
    router(x)
    np.testing.assert_allclose(router.seen, 5 * np.tanh(x / 5), rtol=1e-4)


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


def test_conventions_by_name():
    paper = Top2Router.as_in("paper", 4, name="r")
    assert paper.get_config() == Top2Router(4, name="r").get_config()
    lingvo = Top2Router.as_in("lingvo", 4, name="r")
    assert lingvo.get_config() == {**paper.get_config(), "drop_frees_slot": True}
    mesh = Top2Router.as_in("mesh_tensorflow", 4, capacity_factor=3.0)
    assert (mesh.capacity_factor, mesh.min_capacity) == (3.0, 4)
    with pytest.raises(ValueError, match="convention='mtf'"):
        Top2Router.as_in("mtf", 4)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TopKRouter(4, 5), "5 choices, num_experts=4"),
        (lambda: TopKRouter(4, 0), "k=0"),
        (lambda: TopKRouter(4, 2, scores="tanh"), "scores='tanh'"),
        (lambda: TopKRouter(4, 2, bias_update_rate=-1), "bias_update_rate=-1"),
        (lambda: Top2Router(4, "lossless"), "capacity_factor='lossless'"),
        (lambda: Top2Router(4, 0), "capacity_factor=0"),
        (lambda: Top2Router(4, min_capacity=0), "min_capacity=0"),
        (lambda: Top2Router(4, masked_experts=[4]), r"masked_experts=\[4\]"),
        (lambda: Top2Router(3, masked_experts=[0, 1]), "2 choices, num_experts=3"),
        (lambda: Top2Router(4, second_expert_threshold=0), "threshold=0"),
        (lambda: Top2Router(4, jitter=1.5), "jitter=1.5"),
        (lambda: Top2Router(4, logit_cap=-1.0), "logit_cap=-1.0"),
        (lambda: HashRouter(4, jitter=0.1), "jitter=0.1"),
        (lambda: MoELayer(4, 4, router={"kind": "best"}), "router kind='best'"),
        (lambda: MoELayer(4, 4, router={"kind": "top_k", "k": 9}), "9 choices"),
        (lambda: MoELayer(4, 4, z_loss_coef=-1), "z_loss_coef=-1"),
        (lambda: MoELayer(4, 4, router_metrics=["speed"]), r"\['speed'\]"),
        (
            lambda: MoELayer(4, 4, group_size=64).build((2, 8, 4)),
            r"group_size=64, input_shape=\(2, 8, 4\)",
        ),
    ],
)
def test_bad_options_are_refused_when_the_layer_is_made(make, message):
    with pytest.raises(ValueError, match=f"Received: .*{message}"):
        make()


def test_every_kind_has_a_name():
    for kind, cls in ROUTERS.items():
        layer = MoELayer(4, 4, router={"kind": kind})
        assert type(layer.router) is cls
