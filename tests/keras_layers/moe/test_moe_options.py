"""What a mixture can be besides the paper's: gates, shared experts, other starts."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_layers import (
    ExpertChoiceRouter,
    ExpertLoadImages,
    FeedForward,
    MoELayer,
    RouterMetrics,
    Transformer,
    greedy_decode,
    record_routing,
    replay_routing,
    upcycle,
)

DROPLESS = {"kind": "top_k", "k": 2, "capacity_factor": "dropless"}


def random_inputs(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def small(**arguments):
    arguments = {
        "source_vocab_size": 11,
        "target_vocab_size": 11,
        "num_encoder_layers": 1,
        "num_decoder_layers": 1,
        "model_dim": 8,
        "hidden_dim": 12,
        "num_heads": 2,
        "num_experts": 4,
        "moe_every": 1,
        "seed": 0,
    } | arguments
    return Transformer(**arguments)


IDS = np.random.default_rng(0).integers(3, 11, (3, 6))


def test_gated_and_shared_experts():
    layer = MoELayer(
        3, 6, router=DROPLESS, activation="silu", gated=True, num_shared_experts=2
    )
    x = random_inputs(2, 5, 4)
    mask = np.array([[True] * 5, [True] * 3 + [False] * 2])
    outputs = layer(x, mask=mask).numpy()

    def silu(z):
        return z / (1 + np.exp(-z))

    def ffn(x, wi, wi_gate, wo):
        return (silu(x @ wi_gate) * (x @ wi)) @ wo

    own, shared = layer.experts, layer.shared_experts
    assert shared.wi.shape == (4, 12)
    gates = x @ layer.router.kernel.numpy()
    gates = np.exp(gates) / np.exp(gates).sum(-1, keepdims=True)
    for g, s in np.ndindex(2, 5):
        expected = ffn(x[g, s], *(w.numpy() for w in (shared.wi, shared.wi_gate)),
                       shared.wo.numpy())  # fmt: skip
        best = np.argsort(-gates[g, s])[:2]
        for e in best:
            weight = gates[g, s, e] / gates[g, s, best].sum()
            expected = expected + weight * ffn(
                x[g, s], own.wi[e].numpy(), own.wi_gate[e].numpy(), own.wo[e].numpy()
            )
        if not mask[g, s]:
            expected = np.zeros(4)
        np.testing.assert_allclose(outputs[g, s], expected, rtol=1e-4, atol=1e-5)


def test_shared_experts_make_nothing_of_padding():
    # Where nothing is in, something would come out: half of each hidden unit.
    layer = MoELayer(3, 6, activation="sigmoid", num_shared_experts=1)
    outputs = layer(random_inputs(1, 4, 4), mask=np.array([[True, True, False, False]]))
    assert np.all(outputs[0, :2] != 0) and np.all(outputs[0, 2:] == 0)


def test_gated_feed_forward():
    layer = FeedForward(6, activation="silu", gated=True)
    x = random_inputs(2, 3, 4)
    outputs = layer(x)
    hidden = keras.activations.silu(x @ layer.wi_gate.numpy()) * (x @ layer.wi.numpy())
    np.testing.assert_allclose(outputs, hidden @ layer.wo.numpy(), rtol=1e-4, atol=1e-6)
    again = FeedForward.from_config(layer.get_config())
    assert again.gated


@pytest.mark.parametrize("kind", ["top_k", "expert_choice", "hash"])
def test_every_option_comes_back_from_a_file(kind, tmp_path):
    inputs = keras.Input((6, 4))
    ids = keras.Input((6,), dtype="int32")
    layer = MoELayer(
        4,
        6,
        router={"kind": kind, "min_capacity": 2, "capacity_factor": "dropless"},
        gated=True,
        num_shared_experts=1,
        z_loss_coef=0.1,
        router_metrics="all",
    )
    outputs = layer(inputs, token_ids=ids if kind == "hash" else None)
    feeds = [inputs, ids] if kind == "hash" else [inputs]
    model = keras.Model(feeds, outputs)
    model.save(tmp_path / "m.keras")
    again = keras.models.load_model(tmp_path / "m.keras")
    values = [random_inputs(3, 6, 4), IDS][: len(feeds)]
    np.testing.assert_array_equal(model(values), again(values))
    found = [x for x in again.layers if isinstance(x, MoELayer)][0]
    ours, theirs = layer.get_config(), found.get_config()
    assert ours.pop("router")["config"] == theirs.pop("router")["config"]
    assert ours == theirs


def test_z_loss_is_added_in_training():
    layer = MoELayer(4, 6, aux_loss_coef=0.0, z_loss_coef=0.5)
    x = random_inputs(2, 8, 5)
    layer(x, training=False)
    assert not layer.losses
    layer(x, training=True)
    _, report = layer.router(x)
    np.testing.assert_allclose(layer.losses, [0.5 * report.z_loss], rtol=1e-6)


@pytest.mark.parametrize("kind", ["top2", "top_k", "expert_choice"])
def test_all_metrics(kind):
    layer = MoELayer(4, 6, router={"kind": kind}, router_metrics="all", name="moe")
    x = random_inputs(2, 10, 5)
    mask = np.arange(10) < np.array([[10], [6]])
    layer(x, mask=mask)
    result = {name: float(value) for name, value in layer.health.result().items()}
    assert set(result) == {f"moe_{name}" for name in RouterMetrics.NAMES}
    # By the layer's own routing, which test_routers.py compares with the oracle.
    routing, report = layer.router(x, mask=mask)
    arrived = routing.any_expert().numpy()
    assert result["moe_dropped"] == pytest.approx(np.mean(~arrived[mask]))
    filled = routing.num_filled().numpy()
    # Four experts with a capacity of 10 * 2 / 4, and of 6 * 2 / 4 without the padding.
    assert result["moe_utilisation"] == pytest.approx(filled / (4 * (5 + 3)))
    gates = tf.nn.softmax(x @ layer.router.kernel.numpy()).numpy()
    assert result["moe_confidence"] == pytest.approx(gates.max(-1)[mask].mean(), 1e-5)
    assert result["moe_z_loss"] == pytest.approx(float(report.z_loss), rel=1e-5)
    assert result["moe_aux_loss"] == pytest.approx(float(report.aux_loss), rel=1e-5)


def test_routing_is_recorded_and_replayed():
    model = small(moe_options={"router": {"capacity_factor": 1.0}})
    model((IDS, IDS))
    with record_routing() as plans:
        first = model((IDS, IDS), training=True)  # random second experts
    assert sorted(plans) == ["decoder_1_moe", "encoder_1_moe"]
    other = model((IDS, IDS), training=True)
    assert np.any(first != other)
    model.embedding_dropout.rate = 0.0
    with replay_routing(plans):
        model((IDS, IDS), training=False)
    # The same routing, though the router's weights are others now.
    layer = MoELayer(4, 6, name="moe")
    x = random_inputs(2, 8, 5)
    with record_routing() as plans:
        expected = layer(x)
    layer.router.kernel.assign(-layer.router.kernel)
    assert np.any(layer(x) != expected)
    with replay_routing(plans):
        np.testing.assert_array_equal(layer(x), expected)
    with pytest.raises(ValueError, match="more often"), replay_routing(plans):
        layer(x), layer(x)
    with pytest.raises(ValueError, match="'moe': 1"), replay_routing(plans):
        pass
    inner = tf.function(layer)
    with pytest.raises(ValueError, match="run_eagerly=True"), record_routing():
        inner(x)

    @tf.function
    def both(x):
        with record_routing() as plans:
            return layer(x), plans["moe"][0].expert_index

    assert both(x)[1].shape == (2, 8, 2)


def test_upcycling_a_layer():
    dense = FeedForward(6, activation="gelu")
    x = random_inputs(2, 8, 4)
    expected = dense(x)
    sparse = MoELayer(4, 6, router=DROPLESS, activation="gelu")
    sparse.build(x.shape)
    upcycle(dense, sparse)
    np.testing.assert_allclose(sparse(x), expected, rtol=1e-4, atol=1e-6)
    upcycle(dense, sparse, noise=0.1)
    wi = sparse.experts.wi.numpy()
    spread = (wi - dense.wi.numpy()).std() / dense.wi.numpy().std()
    assert spread == pytest.approx(0.1, rel=0.3)

    keras_dense = [keras.layers.Dense(6, use_bias=False), keras.layers.Dense(4)]
    keras_dense[1](keras_dense[0](x))
    with pytest.raises(ValueError, match="use_bias=False, True"):
        upcycle(keras_dense, sparse)
    wrong = FeedForward(5)
    wrong(x)
    with pytest.raises(ValueError, match=r"Received: .*\(4, 5\)"):
        upcycle(wrong, sparse)
    with pytest.raises(ValueError, match="Received: MoELayer and MoELayer"):
        upcycle(sparse, sparse)


def test_upcycling_a_transformer():
    dense, sparse = (small(num_experts=0), small(moe_options={"router": DROPLESS}))
    for model in (dense, sparse):
        model((IDS, IDS))
    upcycle(dense, sparse)
    np.testing.assert_allclose(
        sparse((IDS, IDS)), dense((IDS, IDS)), rtol=1e-4, atol=1e-5
    )
    with pytest.raises(ValueError, match="is a MoELayer"):
        upcycle(sparse, sparse)
    other = small(model_dim=16)
    other((IDS, IDS))
    with pytest.raises(ValueError, match="must have the same weights"):
        upcycle(dense, other)


def test_expert_choice_needs_consent_in_a_decoder():
    options = {"router": {"kind": "expert_choice"}}
    with pytest.raises(ValueError, match="causal decoder"):
        small(moe_options=options)
    model = small(moe_options=options, decoder_moe_options={})
    assert isinstance(model.encoder_blocks[0].feed_forward.router, ExpertChoiceRouter)
    model((IDS, IDS))
    consent = {"router": {"kind": "expert_choice", "allow_causal": True}}
    small(moe_options=consent)
    prioritized = {"router": {"kind": "top_k", "batch_prioritized": True}}
    with pytest.raises(ValueError, match="causal decoder"):
        small(decoder_moe_options=prioritized)
    again = Transformer.from_config(model.get_config())
    assert again.get_config() == model.get_config()
    with pytest.raises(ValueError, match="cannot be a layer"):
        small(moe_options={"router": ExpertChoiceRouter(4)})


def test_a_transformer_hashes_its_token_ids():
    model = small(
        moe_options={"router": {"kind": "hash", "capacity_factor": "dropless"}}
    )
    logits = model((IDS, IDS))
    assert np.all(np.isfinite(logits))
    ids, _ = greedy_decode(model, IDS, 5, 1, 2)
    # Teacher forcing with what was generated gives it again.
    inputs = np.concatenate([np.ones((3, 1), int), ids[:, :-1]], axis=1)
    forced = model((IDS, inputs)).numpy()
    forced[..., 0] = -1e30
    ids = ids.numpy()
    ended = np.cumsum(ids == 2, axis=1) - (ids == 2)
    np.testing.assert_array_equal(
        np.where(ended, 0, forced.argmax(-1)), np.where(ended, 0, ids)
    )


def test_load_picture(tmp_path):
    x = random_inputs(32, 8, 4)
    model = keras.Sequential([MoELayer(4, 6, name="moe")])
    model.compile("sgd", "mse")
    images = ExpertLoadImages(str(tmp_path), cell=2)
    model.fit(
        x, x, epochs=3, verbose=0, callbacks=[images], validation_data=(x[:4], x[:4])
    )
    assert images.image(0).shape == (8, 6, 1)
    # Shares of the training's load, of which the even one is 1.
    np.testing.assert_allclose(np.sum(images._shares[0], axis=1), 4, rtol=1e-5)
    assert 32 * 8 * 2 == np.sum(images._loads[0])
    [events] = (tmp_path / "train").glob("events*")
    tags = set()
    for event in tf.compat.v1.train.summary_iterator(str(events)):
        tags |= {value.tag for value in event.summary.value}
    assert tags == {f"{model.layers[0].path}/load"}
    dense = keras.Sequential([keras.layers.Dense(4)])
    dense.compile("sgd", "mse")
    with pytest.raises(ValueError, match="needs a model with a MoELayer"):
        dense.fit(x, x, verbose=0, callbacks=[images])
