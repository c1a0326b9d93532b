import json

import keras
import numpy as np
import pytest
import tensorflow as tf
from oracles import algorithm1 as oracle

from keras_layers import MoELayer, TokenChoiceRouting, Top2Router
from keras_layers.moe import Experts
from keras_layers.moe.metrics import RouterMetrics

# No random routing, so that training and evaluation can be compared with the oracle.
ALL = {"second_expert_policy": "all"}


def random_inputs(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def expected_outputs(layer, groups, capacity, mask=None):
    """The oracle's outputs for `groups` `[G, S, M]`, by a capacity or one of each."""
    outputs = []
    capacities = np.broadcast_to(capacity, len(groups))
    for g, tokens in enumerate(groups):
        gates = oracle.softmax(tokens @ layer.router.kernel.numpy())
        real = None if mask is None else mask[g]
        gating = oracle.algorithm1(gates, int(capacities[g]), uniforms=None, real=real)
        outputs.append(
            oracle.moe_layer(
                tokens,
                gating.combine,
                layer.experts.wi.numpy(),
                layer.experts.wo.numpy(),
            )
        )
    return np.stack(outputs)


@pytest.mark.parametrize("dispatcher", ["index", "einsum"])
@pytest.mark.parametrize("training", [False, True])
def test_against_oracle(dispatcher, training):
    layer = MoELayer(
        4, 6, router={"capacity_factor": 1.0, **ALL}, dispatcher=dispatcher
    )
    x = random_inputs(3, 10, 5)
    mask = np.random.default_rng(1).random((3, 10)) < 0.8
    outputs = layer(x, mask=mask, training=training)
    capacity = np.ceil(mask.sum(1) / 4)  # at a factor of 1; padding makes no room
    np.testing.assert_allclose(
        outputs, expected_outputs(layer, x, capacity, mask), rtol=1e-4, atol=1e-5
    )
    assert np.all(outputs.numpy()[~mask] == 0)


def test_groups_of_a_given_size():
    layer = MoELayer(4, 6, router=ALL, group_size=8)
    x = random_inputs(3, 7, 5)
    outputs = layer(x)
    # 21 tokens in groups of 8: the last one has 3 tokens of padding.
    flat = np.concatenate([x.reshape(21, 5), np.zeros((3, 5), np.float32)])
    mask = (np.arange(24) < 21).reshape(3, 8)
    expected = expected_outputs(layer, flat.reshape(3, 8, 5), [4, 4, 3], mask)
    np.testing.assert_allclose(
        outputs, expected.reshape(24, 5)[:21].reshape(3, 7, 5), rtol=1e-4, atol=1e-5
    )
    flat_outputs = layer(x.reshape(21, 5))
    np.testing.assert_allclose(flat_outputs, tf.reshape(outputs, [21, 5]), atol=1e-6)


def test_more_dimensions_and_unknown_ones():
    layer = MoELayer(4, 6, router=ALL)
    x = random_inputs(2, 3, 7, 5)
    mask = np.random.default_rng(1).random((2, 3, 7)) < 0.8
    outputs = layer(x, mask=mask)
    assert outputs.shape == (2, 3, 7, 5)
    flat = layer(x.reshape(6, 7, 5), mask=mask.reshape(6, 7))
    np.testing.assert_allclose(tf.reshape(outputs, [6, 7, 5]), flat, atol=1e-6)
    for size in (None, 4):
        layer.group_size = size
        known = layer(x, mask=mask)
        unknown = tf.function(
            lambda x, mask: layer(x, mask=mask),
            input_signature=[
                tf.TensorSpec([None, None, None, 5]),
                tf.TensorSpec([None, None, None], tf.bool),
            ],
        )(x, mask)
        np.testing.assert_allclose(known, unknown, atol=1e-6)


def test_padding_changes_nothing_for_real_tokens():
    layer = MoELayer(4, 6, router=ALL)
    x = random_inputs(2, 8, 5)
    mask = np.arange(8) < 6
    mask = np.stack([mask, mask])
    first = layer(x, mask=mask, training=True)
    losses, metrics = layer.losses[0], layer.health.result()
    layer.health.reset_state()
    noisy = np.where(mask[..., None], x, 1e3 * random_inputs(2, 8, 5, seed=9))
    # A fresh layer call: losses of the call before are gone by then in `fit`.
    layer._clear_losses()
    second = layer(noisy.astype(np.float32), mask=mask, training=True)
    np.testing.assert_allclose(first, second, atol=1e-6)
    np.testing.assert_allclose(losses, layer.losses[0], rtol=1e-6)
    for name, value in layer.health.result().items():
        np.testing.assert_allclose(value, metrics[name], rtol=1e-6)


def test_keras_masks_reach_the_layer_and_pass_through():
    inputs = keras.Input([None], dtype="int32")
    embedded = keras.layers.Embedding(10, 5, mask_zero=True)(inputs)
    model = keras.Model(inputs, MoELayer(2, 6, router=ALL, name="moe")(embedded))
    ids = np.array([[1, 2, 0, 0]])
    outputs = model(ids)
    assert np.all(outputs[0, 2:] == 0) and np.any(outputs[0, :2] != 0)
    np.testing.assert_array_equal(
        keras.src.backend.get_keras_mask(outputs), [[True, True, False, False]]
    )


def test_decoding_never_drops_and_leaves_no_trace():
    tight = MoELayer(8, 6, router={"capacity_factor": 0.1, **ALL}, group_size=16)
    x = np.broadcast_to(random_inputs(1, 1, 5), (16, 1, 5))
    crowded = tight(x, training=True)
    # All tokens alike, so all want the same two experts, which have one slot each.
    assert np.count_nonzero(np.any(crowded != 0, axis=-1)) == 1
    before = tight.health.result()
    tight._clear_losses()
    outputs = tight(x, decoding=True)
    expected = expected_outputs(tight, x, 1)
    np.testing.assert_allclose(outputs, expected, rtol=1e-4, atol=1e-6)
    assert not tight.losses
    for name, value in tight.health.result().items():
        assert value == before[name]


@pytest.mark.broad(5)
@pytest.mark.parametrize("count", [1, 5, 40])
@pytest.mark.parametrize("alike", [True, False])
def test_decoding_is_the_same_with_any_number_of_tokens(count, alike):
    """By gathered weights, with few slots and with all: as each token by itself."""
    layer = MoELayer(8, 6, gated=True)
    x = random_inputs(count, 1, 5)
    x = np.broadcast_to(x[:1], x.shape) if alike else x
    layer(x[:1])
    expected = np.concatenate([layer(row[None], decoding=True) for row in x])
    assert np.all(np.any(expected != 0, axis=-1))
    known = tf.function(lambda x: layer(x, decoding=True), jit_compile=True)
    signature = [tf.TensorSpec([None, 1, 5], tf.float32)]
    unknown = tf.function(known.python_function, input_signature=signature)
    for decode in (known, unknown):
        np.testing.assert_allclose(decode(x), expected, rtol=1e-4, atol=1e-6)


def test_an_even_load_needs_few_slots(monkeypatch):
    layer = MoELayer(8, 6)
    layer.build((None, None, 5))
    slots, feed = [], layer.experts.call

    def counting(inputs, **arguments):
        slots.append(inputs.shape[2])
        return feed(inputs, **arguments)

    monkeypatch.setattr(layer.experts, "call", counting)
    x = random_inputs(64, 1, 5)
    layer(x, decoding=True)
    layer(np.broadcast_to(x[:1], x.shape), decoding=True)
    # An even load is 2 * 64 / 8 = 16.
    assert slots[0] < 64 and slots[1] == 64


def test_decoding_in_groups_drops_what_does_not_fit():
    layer = MoELayer(
        8, 6, router={"eval_capacity_factor": 0.5, **ALL}, decoding_group_size=16
    )
    x = np.broadcast_to(random_inputs(1, 1, 5), (16, 1, 5))
    served = np.any(layer(x, decoding=True) != 0, axis=-1)
    # The evaluation capacity leaves each of the two experts wanted one slot.
    assert np.count_nonzero(served) == 1
    assert np.all(np.any(layer(x, training=True) != 0, axis=-1)[:4])


def test_aux_loss_is_added_in_training_only():
    layer = MoELayer(4, 6, router=ALL, aux_loss_coef=0.5)
    x = random_inputs(2, 8, 5)
    layer(x, training=False)
    assert not layer.losses
    layer(x, training=True)
    _, (aux_loss, *_) = layer.router(x)
    np.testing.assert_allclose(layer.losses, [0.5 * aux_loss], rtol=1e-6)
    silent = MoELayer(4, 6, aux_loss_coef=0.0)
    silent(x, training=True)
    assert not silent.losses


def test_aux_loss_balances_the_load():
    layer = MoELayer(4, 4, aux_loss_coef=1.0, name="moe")
    x = random_inputs(4, 64, 5) + np.array([1.0, 0, 0, 0, 0], np.float32)
    layer.build(x.shape)
    # A bias towards expert 0 through the constant part of the inputs.
    layer.router.kernel.assign_add(np.eye(5, 4, dtype=np.float32) * [3.0, 0, 0, 0])
    model = keras.Sequential([layer])
    model.compile(keras.optimizers.Adam(0.05), loss=lambda y, p: 0.0 * tf.reduce_sum(p))
    history = model.fit(x, x, epochs=25, verbose=0).history
    assert history["moe_max_load"][0] > 1.3
    assert history["moe_max_load"][-1] < 1.2
    assert history["moe_load_entropy"][-1] > 0.99
    assert history["loss"][-1] < 1.05 < history["loss"][0]


def routing_of(expert_index, dispatched, num_experts):
    expert_index, dispatched = tf.constant([expert_index]), tf.constant([dispatched])
    zeros = tf.zeros_like(expert_index)
    return TokenChoiceRouting(
        expert_index, zeros, tf.zeros(zeros.shape), dispatched, num_experts, capacity=1
    )


def test_metrics():
    metric = RouterMetrics(4, per_expert=True, name="m")
    assert all(value == 0 for value in metric.result().values())
    chosen = [[0, 1], [0, 1], [0, 2], [3, 3]]
    dispatched = [[True, True], [False, True], [False, False], [False, False]]
    # The last token is padding. Asked for: 3, 2, 1, 0 of experts 0, 1, 2, 3.
    metric.update_state(
        routing_of(chosen, dispatched, 4), tf.constant([[True, True, True, False]])
    )
    result = {name: float(value) for name, value in metric.result().items()}
    share = np.array([3, 2, 1]) / 6
    expected = {
        "m_dropped": 1 / 3,
        "m_load_entropy": -np.sum(share * np.log(share)) / np.log(4),
        "m_max_load": 4 * 3 / 6,
        "m_load_0": 3 / 6,
        "m_load_1": 2 / 6,
        "m_load_2": 1 / 6,
        "m_load_3": 0,
    }
    assert result == pytest.approx(expected)
    metric.update_state(routing_of([[3, 2]] * 3, [[True, True]] * 3, 4))
    assert metric.result()["m_load_3"] == 3 / 12
    np.testing.assert_allclose(metric.result()["m_dropped"], 1 / 6)
    metric.reset_state()
    assert metric.result()["m_max_load"] == 0
    with pytest.raises(ValueError, match="sample_weight=2"):
        metric.update_state(routing_of(chosen, dispatched, 4), sample_weight=2)


@pytest.mark.parametrize(
    ("policy", "jit_compile"),
    [
        pytest.param("float32", False, marks=pytest.mark.slow),
        ("mixed_bfloat16", True),
    ],
)
def test_fit_learns_and_logs(policy, jit_compile):
    keras.config.set_dtype_policy(policy)
    x = random_inputs(64, 8, 4)
    # A different linear map for each sign of the first feature: work for experts.
    y = np.where(x[..., :1] > 0, x @ random_inputs(4, 4, seed=1), -2.0 * x)
    model = keras.Sequential([MoELayer(4, 16, seed=0, name="moe")])
    model.compile(keras.optimizers.Adam(0.02), "mse", jit_compile=jit_compile)
    history = model.fit(
        x, y, epochs=15, batch_size=16, verbose=0, validation_data=(x, y)
    ).history
    assert history["loss"][-1] < 0.5 * history["loss"][0]
    for name in ("dropped", "load_entropy", "max_load"):
        assert f"moe_{name}" in history and f"val_moe_{name}" in history
    assert 0 < history["val_moe_load_entropy"][-1] <= 1
    kernel = model.layers[0].experts.wi
    assert kernel.dtype == "float32"
    assert model.predict(x, verbose=0).dtype == model.compute_dtype


def test_expert_weights_have_the_scale_of_one_expert():
    layer = Experts(16, 50)
    layer.build((16, None, None, 30))
    assert layer.wi.shape == (16, 30, 50) and layer.wo.shape == (16, 50, 30)
    np.testing.assert_allclose(np.std(layer.wi), 30**-0.5, rtol=0.03)
    np.testing.assert_allclose(np.std(layer.wo), 50**-0.5, rtol=0.03)
    constant = Experts(16, 50, kernel_initializer="ones")
    constant.build((16, None, None, 30))
    assert np.all(constant.wi == 1)


def test_expert_dropout_is_for_training():
    layer = MoELayer(2, 64, router=ALL, dropout=0.5)
    x = random_inputs(1, 4, 8)
    np.testing.assert_array_equal(layer(x), layer(x))
    assert np.any(layer(x, training=True) != layer(x, training=True))


def test_saving(tmp_path):
    x = random_inputs(2, 8, 4)
    router = Top2Router(4, capacity_factor=1.0, seed=3, name="gate")
    model = keras.Sequential(
        [
            keras.Input([None, 4]),
            MoELayer(4, 6, router=router, group_size=5, activation="gelu", seed=1),
            MoELayer(
                2,
                6,
                router={"capacity_factor": 1.5},
                dispatcher="einsum",
                aux_loss_coef=0.1,
                dropout=0.1,
                kernel_initializer="he_normal",
                metrics_per_expert=True,
            ),
        ]
    )
    model.save(tmp_path / "model.keras")
    copy = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_allclose(model(x), copy(x), atol=1e-6)
    for one, other in zip(model.layers, copy.layers, strict=True):
        # As JSON, which has no tuples: shapes come back as lists.
        assert json.dumps(one.get_config()) == json.dumps(other.get_config())


def test_export(tmp_path):
    model = keras.Sequential([keras.Input([8, 4]), MoELayer(4, 6)])
    x = random_inputs(2, 8, 4)
    model.export(tmp_path / "exported", verbose=False)
    served = tf.saved_model.load(tmp_path / "exported")
    np.testing.assert_allclose(served.serve(x), model(x), atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_experts": 1, "hidden_dim": 4}, "num_experts=1"),
        ({"num_experts": 4, "hidden_dim": 0}, "hidden_dim=0"),
        ({"num_experts": 4, "hidden_dim": 4, "group_size": 0}, "group_size=0"),
        ({"num_experts": 4, "hidden_dim": 4, "dispatcher": "x"}, "dispatcher='x'"),
        ({"num_experts": 4, "hidden_dim": 4, "aux_loss_coef": -1}, "aux_loss_coef=-1"),
        ({"num_experts": 4, "hidden_dim": 4, "dropout": 1.0}, "rate=1.0"),
        ({"num_experts": 4, "hidden_dim": 4, "router": Top2Router(8)}, "for 8"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=f"Received: .*{message}"):
        MoELayer(**arguments)


def test_bad_inputs():
    with pytest.raises(ValueError, match=r"Received: input_shape=\(3, 5\)"):
        MoELayer(2, 4)(tf.zeros([3, 5]))
    with pytest.raises(ValueError, match=r"Received: input_shape=\(3, None\)"):
        MoELayer(2, 4).build((3, None))


@pytest.mark.parametrize("dispatcher", ["index", "einsum"])
def test_an_empty_batch_stays_empty(dispatcher):
    layer = MoELayer(4, 8, dispatcher=dispatcher)
    assert layer(tf.zeros([0, 5, 6])).shape == (0, 5, 6)
    assert layer(tf.zeros([0, 0, 6])).shape == (0, 0, 6)
