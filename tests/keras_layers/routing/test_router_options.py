"""Options of routers: what each does, and which values it refuses."""

import numpy as np
import pytest
import tensorflow as tf

from keras_layers import (
    ExpertChoiceRouter,
    HashRouter,
    MoELayer,
    Top2Router,
    TopKRouter,
)
from keras_layers.routing import ROUTERS, router_z_loss


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
    ("options", "message"),
    [
        ({"bias_update_rate": 0.1, "score_bias": False}, "must be 0 without"),
        ({"weight_scale": 0.0}, "weight_scale must be above 0"),
    ],
)
def test_options_of_top_k_that_do_not_fit(options, message):
    with pytest.raises(ValueError, match=message):
        TopKRouter(8, 2, **options)


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
