"""Padding changes nothing for real tokens, wherever it is and whatever it holds."""

import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st
from parity import assert_equal_runs

from keras_layers import (
    DecoderBlock,
    EncoderBlock,
    MoELayer,
    MultiHeadAttention,
    Transformer,
    beam_search,
    greedy_decode,
    sample_decode,
)
from keras_layers._padding import unpadded_positions, zero_padding

GROUPS, SIZE, WIDTH, EXPERTS = 3, 12, 6, 4
ROUTERS = {
    "top2": {"capacity_factor": 0.9},
    "top2 rounded": {"capacity_factor": 0.5, "min_capacity": 2, "capacity_multiple": 3},
    "top2 not legacy": {"capacity_factor": 0.8, "legacy_mtf_behavior": False},
    "sampling": {"second_expert_policy": "sampling", "capacity_factor": 1.1},
    "jitter": {"kind": "top_k", "k": 1, "capacity_factor": 1.0, "jitter": 0.3},
    "priority": {"kind": "top_k", "capacity_factor": 0.8, "batch_prioritized": True},
    "bias": {"kind": "top_k", "capacity_factor": 1.0, "scores": "sigmoid",
             "bias_update_rate": 0.1},
    "masked": {"kind": "top_k", "capacity_factor": 1.0, "masked_experts": [1]},
    "dropless": {"kind": "top_k", "capacity_factor": "dropless"},
    "choice": {"kind": "expert_choice", "capacity_factor": 1.0},
    "hash": {"kind": "hash", "capacity_factor": 1.0},
}  # fmt: skip


def layer_of(router, **options):
    keras.utils.set_random_seed(5)
    layer = MoELayer(
        EXPERTS,
        7,
        router=ROUTERS[router],
        router_metrics="all",
        metrics_per_expert=True,
        num_shared_experts=1,
        z_loss_coef=0.01,
        seed=3,
        name="moe",
        **options,
    )
    layer.build((None, None, WIDTH))
    return layer


def outcome(layer, x, ids, mask, training, keep):
    """Outputs of the tokens to `keep`, losses, metrics and gradients of a call."""
    start = [v.numpy() for v in layer.variables]
    layer.health.reset_state()
    layer._clear_losses()  # as Keras does before a step
    x = tf.constant(x)
    with tf.GradientTape() as tape:
        tape.watch(x)
        y = layer(x, mask=mask, training=training, token_ids=ids)
        real = tf.boolean_mask(y, keep)
        loss = tf.add_n([tf.reduce_sum(tf.sin(real)), *layer.losses])
    *gradients, d_x = tape.gradient(loss, [*layer.trainable_variables, x])
    found = {
        "outputs": real,
        "loss": loss,
        "d_x": tf.boolean_mask(d_x, keep),
        **{k: v.numpy() for k, v in layer.health.result().items()},
        **{f"gradient {i}": g for i, g in enumerate(gradients) if g is not None},
        **{f"after {i}": v.numpy() for i, v in enumerate(layer.variables)},
    }
    for variable, value in zip(layer.variables, start, strict=True):
        variable.assign(value)
    return {k: np.asarray(v) for k, v in found.items()}


def check_same(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(
            found[name], value, rtol=1e-4, atol=1e-5, err_msg=name
        )


@pytest.mark.broad(6)
@pytest.mark.parametrize("router", ROUTERS)
@settings(max_examples=6)
@given(
    length=st.sampled_from([1, 5, 11]),
    dispatcher=st.sampled_from(["index", "einsum"]),
    training=st.booleans(),
    side=st.sampled_from(["left", "right", "anywhere"]),
    junk=st.sampled_from([0.0, 1e3, np.nan, np.inf]),
    seed=st.integers(0, 2**31),
)
def test_real_tokens_are_as_without_padding(
    router, length, dispatcher, training, side, junk, seed
):
    layer = layer_of(router, dispatcher=dispatcher)
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(GROUPS, length, WIDTH)).astype("float32")
    ids = rng.integers(0, 50, (GROUPS, length))
    everything = np.ones((GROUPS, length), bool)
    expected = outcome(layer, x, ids, None, training, everything)

    mask = np.arange(SIZE)[None] < np.full((GROUPS, 1), length)
    if side == "left":
        mask = mask[:, ::-1].copy()
    elif side == "anywhere":
        mask = rng.permuted(mask, axis=1)
    padded = np.full((GROUPS, SIZE, WIDTH), junk, np.float32)
    padded[mask] = x.reshape(-1, WIDTH)
    padded_ids = np.zeros((GROUPS, SIZE), ids.dtype)
    padded_ids[mask] = ids.reshape(-1)
    found = outcome(layer, padded, padded_ids, mask, training, mask)
    check_same(found, expected)


@pytest.mark.parametrize("router", ["top2", "choice", "hash"])
def test_packed_groups_are_those_of_a_batch_without_padding(router):
    layer = layer_of(router, group_size=8, pack_groups=True)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(GROUPS, 7, WIDTH)).astype("float32")
    ids = rng.integers(0, 50, (GROUPS, 7))
    everything = np.ones((GROUPS, 7), bool)
    expected = outcome(layer, x, ids, None, True, everything)
    mask = rng.permuted(np.arange(SIZE) < np.full((GROUPS, 1), 7), axis=1)
    padded = np.full((GROUPS, SIZE, WIDTH), np.nan, np.float32)
    padded[mask] = x.reshape(-1, WIDTH)
    padded_ids = np.zeros((GROUPS, SIZE), ids.dtype)
    padded_ids[mask] = ids.reshape(-1)
    check_same(outcome(layer, padded, padded_ids, mask, True, mask), expected)
    # And not without: this shows that the case tells the two apart.
    layer.pack_groups = False
    found = outcome(layer, padded, padded_ids, mask, True, mask)["outputs"]
    assert np.abs(found - expected["outputs"]).max() > 1e-3


@pytest.mark.slow
def test_packed_groups_on_a_mesh_are_those_of_one_device():
    x = np.random.default_rng(0).normal(size=(8, 12, WIDTH)).astype("float32")
    x[::2, 3:9] = 0.0  # padding, for a mask

    def make():
        moe = MoELayer(4, 8, group_size=16, pack_groups=True, seed=1, name="moe")
        model = keras.Sequential(
            [keras.layers.Masking(), keras.layers.Dense(WIDTH), moe]
        )
        model.compile(keras.optimizers.SGD(0.1), "mse")
        return model

    def use(model):
        return model.fit(x, x, batch_size=8, epochs=2, verbose=0).history

    assert_equal_runs(make, use, 4)


def test_packing_is_for_groups_of_a_size():
    with pytest.raises(ValueError, match="Received: pack_groups=True, group_size=None"):
        MoELayer(4, 8, pack_groups=True)
    x, mask = tf.ones([2, 8, 4]), tf.ones([2, 8], tf.bool)
    layer = MoELayer(4, 8, group_size=8)
    with pytest.warns(UserWarning, match="or pass pack_groups=True"):
        layer(x, mask=mask)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        layer(x, mask=mask)  # once
        MoELayer(4, 8, group_size=8)(x)
        MoELayer(4, 8, group_size=8, pack_groups=True)(x, mask=mask)
    config = MoELayer(4, 8, group_size=8, pack_groups=True).get_config()
    assert MoELayer.from_config(config).pack_groups


@pytest.mark.parametrize("router", ["top2", "priority", "choice"])
def test_each_group_has_the_room_of_its_own_tokens(router):
    """Rows of other lengths, and sizes that are not known when it is traced."""
    layer = layer_of(router)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(4, SIZE, WIDTH)).astype("float32")
    mask = np.arange(SIZE)[None] < np.array([[12], [7], [1], [0]])
    mask = rng.permuted(mask, axis=1)
    unknown = tf.function(
        lambda x, mask: layer(x, mask=mask),
        input_signature=[
            tf.TensorSpec([None, None, WIDTH]),
            tf.TensorSpec([None, None], tf.bool),
        ],
    )
    for call in (layer, unknown):
        y = call(x, mask=mask) if call is layer else call(x, mask)
        assert np.all(y.numpy()[~mask] == 0)
        for row in range(3):
            alone = layer(x[row][mask[row]][None])[0]
            np.testing.assert_allclose(y[row][mask[row]], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.broad(3)
@pytest.mark.parametrize("dispatcher", ["index", "einsum"])
@pytest.mark.parametrize("router", ["top2", "bias", "priority", "choice"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_in_a_token_stays_in_it(router, dispatcher, bad):
    router = {**ROUTERS[router], "capacity_factor": "dropless"}
    layer = MoELayer(EXPERTS, 7, router=router, dispatcher=dispatcher)
    x = np.random.default_rng(0).normal(size=(2, 8, WIDTH)).astype("float32")
    clean = layer(x).numpy()
    x[0, 5] = bad
    found = layer(x).numpy()
    others = np.ones((2, 8), bool)
    others[0, 5] = False
    np.testing.assert_allclose(found[others], clean[others], rtol=1e-5, atol=1e-6)
    assert not np.any(np.isfinite(found[0, 5])) or not np.any(found[0, 5])


def moved(ids, how):
    """`ids` `[B, L]` with five positions of padding."""
    zeros = np.zeros((len(ids), 5), ids.dtype)
    half = ids.shape[1] // 2
    parts = {
        "right": [ids, zeros],
        "left": [zeros, ids],
        "within": [ids[:, :half], zeros, ids[:, half:]],
    }[how]
    return np.concatenate(parts, axis=1)


@pytest.fixture(scope="module")
def transformer():
    keras.utils.set_random_seed(0)
    model = Transformer(
        24, 24, 1, 1, 16, 16, 2, num_experts=4, moe_every=1, dropout=0.0,
        moe_options={"router": {"capacity_factor": 0.9}},
    )  # fmt: skip
    model.build()
    return model


@pytest.mark.parametrize("training", [False, True])
def test_a_transformer_sees_no_padding(transformer, training):
    source, target = np.random.default_rng(0).integers(3, 24, (2, 3, 8))
    seeds = [v for v in transformer.variables if "seed" in v.path]
    start = [v.numpy() for v in seeds]

    def run(source, target):
        for variable, value in zip(seeds, start, strict=True):
            variable.assign(value)
        transformer._clear_losses()
        logits = transformer((source, target), training=training)
        return logits.numpy()[target != 0], [float(x) for x in transformer.losses]

    expected, losses = run(source, target)
    assert len(losses) == 2 * training
    for how in ("right", "left", "within"):
        found, others = run(moved(source, how), moved(target, how))
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4, err_msg=how)
        np.testing.assert_allclose(others, losses, rtol=1e-5)


@pytest.mark.slow  # test_transformer.py has rows of many lengths, too
def test_decoding_sees_no_padding(transformer):
    source = np.random.default_rng(1).integers(3, 24, (4, 8))
    arguments = {"max_length": 4, "bos_id": 1, "eos_id": 2}
    # All read the source alike: one of them has padding everywhere.
    ways = [
        (greedy_decode, {}, ("right", "left", "within")),
        (beam_search, {"beam_size": 2}, ("left",)),
        (beam_search, {"beam_size": 2, "flat": True}, ("within",)),
        (sample_decode, {"seed": [1, 2]}, ("left",)),
    ]
    for decode, options, places in ways:
        expected = decode(transformer, source, **arguments, **options)
        for how in places:
            found = decode(transformer, moved(source, how), **arguments, **options)
            np.testing.assert_array_equal(found[0], expected[0])
            np.testing.assert_allclose(found[-1], expected[-1], rtol=1e-3)


BLOCKS = {
    "attention": lambda: MultiHeadAttention(2, 4, seed=0),
    "encoder": lambda: EncoderBlock(2, 4, 7, num_experts=4, seed=0),
    "decoder": lambda: DecoderBlock(2, 4, 7, seed=0),
}


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("bad", [np.nan, -np.inf])
def test_what_padding_holds_reaches_no_gradient(name, bad):
    keras.utils.set_random_seed(0)
    layer = BLOCKS[name]()
    x = np.random.default_rng(0).normal(size=(2, 6, WIDTH)).astype("float32")
    mask = np.arange(6)[None] < [[4], [6]]
    # Attention and the decoder have a memory; it is padded as the inputs are.
    two = name != "encoder"

    def run(padding):
        inputs = np.where(mask[..., None], x, np.float32(padding))
        arguments = {"memory": inputs, "memory_mask": mask} if two else {}
        with tf.GradientTape() as tape:
            y = layer(inputs, mask=mask, training=False, **arguments)
            real = tf.boolean_mask(y, mask)
            loss = tf.reduce_sum(tf.sin(real))
        return [real, *tape.gradient(loss, layer.trainable_variables)]

    for found, expected in zip(run(bad), run(0.0), strict=True):
        assert np.any(expected != 0)
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_zeros_in_place_of_padding():
    x = tf.constant([[[1.0, np.nan], [np.inf, 2.0], [3.0, 4.0]]])
    mask = tf.constant([[False, False, True]])
    with tf.GradientTape() as tape:
        tape.watch(x)
        y = tf.reduce_sum(tf.square(zero_padding(x, mask)))
    np.testing.assert_array_equal(y, 25.0)
    np.testing.assert_array_equal(tape.gradient(y, x), [[[0, 0], [0, 0], [6, 8]]])
    assert zero_padding(x, None) is x
    found = unpadded_positions(tf.constant([[False, True, False, True, True, False]]))
    np.testing.assert_array_equal(found, [[0, 0, 1, 1, 2, 3]])
