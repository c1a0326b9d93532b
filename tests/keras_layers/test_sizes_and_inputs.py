"""Sizes from NumPy, inputs of any dtype and rank, ids that come as floats."""

import json

import keras
import numpy as np
import pytest
import tensorflow as tf
from parity import assert_equal_runs
from processes import run_python

from keras_layers import (
    DecoderBlock,
    Dropout,
    EncoderBlock,
    Experts,
    FeedForward,
    MoELayer,
    MultiHeadAttention,
    TokenEmbedding,
    Top2Router,
    TopKRouter,
    Transformer,
    VocabularyProjection,
)

N, HALF = np.int64, np.float32(0.5)
SIZED = {
    "attention": lambda: MultiHeadAttention(N(2), N(4), dropout=HALF),
    "decoder": lambda: DecoderBlock(N(2), N(4), N(8), N(4), dropout=HALF),
    "dropout": lambda: Dropout(HALF, noise_shape=(None, N(1)), batch_dim=N(0)),
    "embedding": lambda: TokenEmbedding(N(9), N(4)),
    "encoder": lambda: EncoderBlock(np.int32(2), N(4), N(8), N(4)),
    "experts": lambda: Experts(N(4), N(8)),
    "feed_forward": lambda: FeedForward(np.uint8(8), dropout=HALF),
    "moe": lambda: MoELayer(
        N(4),
        N(8),
        router={"min_capacity": N(2), "jitter": HALF, "masked_experts": np.array([1])},
        group_size=N(4),
        aux_loss_coef=HALF,
        num_shared_experts=N(1),
        decoding_group_size=N(2),
    ),
    "projection": lambda: VocabularyProjection(N(9)),
    "top2": lambda: Top2Router(N(4), HALF, second_expert_threshold=HALF),
    "top_k": lambda: TopKRouter(N(4), N(1), HALF, bias_update_rate=HALF),
    "transformer": lambda: Transformer(
        *(N(n) for n in (9, 9, 2, 2, 4, 8, 2)),
        num_experts=N(4),
        moe_every=N(2),
        pad_id=N(0),
        bos_id=N(1),
    ),
}


@pytest.mark.parametrize("kind", SIZED)
def test_sizes_may_be_numpy_numbers(kind):
    layer = SIZED[kind]()
    config = json.loads(json.dumps(layer.get_config()))
    copy = type(layer).from_config(config)
    assert json.loads(json.dumps(copy.get_config())) == config


@pytest.mark.parametrize("value", [True, np.True_, 2.0, np.float64(2), "2", None, N(0)])
def test_what_is_no_size(value):
    for make in (
        lambda: MoELayer(4, hidden_dim=value),
        lambda: FeedForward(hidden_dim=value),
        lambda: EncoderBlock(2, 4, hidden_dim=value),
        lambda: Transformer(9, 9, 1, 1, 4, hidden_dim=value, num_heads=2),
    ):
        with pytest.raises(ValueError, match="Received: hidden_dim="):
            make()


def test_a_router_by_its_name():
    layer = MoELayer(4, 8, router="top_k", seed=3)
    assert layer.router.get_config()["k"] == 2
    assert isinstance(layer.router, TopKRouter)
    # Its seed follows from the layer's.
    again = MoELayer(4, 8, router={"kind": "top_k"}, seed=3)
    assert layer.router.seed == again.router.seed
    with pytest.raises(ValueError, match="Received: router kind='top3'"):
        MoELayer(4, 8, router="top3")


INTEGERS = {
    "attention": lambda: MultiHeadAttention(2, 4),
    "feed_forward": lambda: FeedForward(8, gated=True),
    "moe": lambda: MoELayer(4, 8, num_shared_experts=1),
    "projection": lambda: VocabularyProjection(9),
}


@pytest.mark.parametrize("kind", INTEGERS)
@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16"])
def test_whole_numbers_as_inputs(kind, policy):
    keras.config.set_dtype_policy(policy)
    layer = INTEGERS[kind]()
    x = np.random.default_rng(0).integers(-3, 4, (2, 5, 6))
    outputs = layer(tf.constant(x))
    np.testing.assert_array_equal(outputs, layer(x.astype("float32")))
    model = keras.Sequential([keras.Input([5, 6], dtype="int32"), INTEGERS[kind]()])
    assert model.predict(x, verbose=0).shape == outputs.shape


SHAPES = [(3, 6), (2, 3, 6), (2, 3, 4, 6), (2, 3, 2, 2, 6)]


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_feed_forward_at_each_position(shape, gated):
    layer = FeedForward(8, activation="tanh", gated=gated)
    x = np.random.default_rng(0).normal(size=shape).astype("float32")
    outputs = layer(x)
    hidden = np.tanh(x @ (layer.wi_gate if gated else layer.wi).numpy())
    if gated:
        hidden = hidden * (x @ layer.wi.numpy())
    np.testing.assert_allclose(outputs, hidden @ layer.wo.numpy(), atol=1e-5)
    assert layer.compute_output_shape((None, *shape[1:])) == (None, *shape[1:])
    symbolic = FeedForward(8)(keras.Input(shape[1:]))
    assert symbolic.shape == (None, *shape[1:])


@pytest.mark.parametrize("shape", SHAPES)
def test_projection_at_each_position(shape):
    layer = VocabularyProjection(8)
    x = np.random.default_rng(0).normal(size=shape).astype("float32")
    np.testing.assert_allclose(layer(x), x @ layer.kernel.numpy(), atol=1e-5)
    assert layer(keras.Input(shape[1:])).shape == (None, *shape[1:-1], 8)


@pytest.mark.parametrize("shape", [(3,), (2, 3), (2, 3, 4)])
@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "int64", "float32"])
def test_embedding_of_any_ids(shape, dtype):
    layer = TokenEmbedding(300, 4)
    ids = np.random.default_rng(0).integers(0, 100, shape).astype(dtype)
    with tf.GradientTape() as tape:
        embedded = layer(ids)
    table = layer.table.numpy()
    np.testing.assert_allclose(embedded, 2.0 * table[ids.astype(int)], rtol=1e-6)
    gradient = tape.gradient(embedded, layer.table.value).numpy()
    np.testing.assert_allclose(
        gradient[:, 0], 2.0 * np.bincount(ids.astype(int).ravel(), minlength=300)
    )


def test_low_precision_does_not_round_ids():
    layer = TokenEmbedding(300, 4, dtype="mixed_bfloat16")
    model = keras.Sequential([keras.Input([1]), layer])  # of float32
    found = model.predict(np.array([[257.0]]), verbose=0)
    np.testing.assert_array_equal(found, layer(np.array([[257]])))


@pytest.mark.parametrize("shape", [(6,), (8, 4, 6)])
def test_any_rank_on_a_mesh(shape):
    x = np.random.default_rng(0).normal(size=(16, *shape)).astype("float32")

    def make():
        inputs = keras.Input(shape)
        outputs = keras.layers.Dense(1)(FeedForward(8)(inputs))
        model = keras.Model(inputs, outputs)
        model.compile("adam", "mse")
        return model

    assert_equal_runs(
        make,
        lambda model: model.fit(x, x[..., :1], batch_size=8, verbose=0, shuffle=False),
        mesh={"data": 2, "model": 2},
    )


def test_masks_pass_at_any_rank():
    masked = keras.layers.Masking()(np.ones([2, 3, 4, 6], "float32"))
    assert FeedForward(8)(masked)._keras_mask is masked._keras_mask


def test_shapes_that_are_refused():
    for make, shape in (
        (lambda: FeedForward(8), (None,)),
        (lambda: FeedForward(8), (None, 3, None)),
        (lambda: VocabularyProjection(8), (None, 3, None)),
        (lambda: MultiHeadAttention(2, 4), (None, 6)),
        (lambda: MultiHeadAttention(2, 4), (None, 3, 3, 6)),
        (lambda: Experts(4, 8), (4, None, 6)),
    ):
        with pytest.raises(ValueError, match="Received: .*shape"):
            make().build(shape)
    layer = MultiHeadAttention(2, 4)
    layer.build((None, None, 6))
    with pytest.raises(ValueError, match=r"Received: shapes \[\(2, 3, 3, 6\)\]"):
        layer(np.ones([2, 3, 3, 6], "float32"))
    with pytest.raises(ValueError, match=r"Received: shapes \[\(2, 3, 3, 6\)\]"):
        EncoderBlock(2, 4, 8)(np.ones([2, 3, 3, 6], "float32"))


@pytest.mark.slow  # as one of segments does, too
def test_an_exported_transformer_takes_ids(tmp_path):
    """Keras's signature is of the dtype that the model says its inputs are of."""
    model = Transformer(400, 400, 1, 1, 4, 8, 2, dtype="mixed_bfloat16")
    ids = np.array([[257, 259, 3, 0]], "int32")
    logits = model((ids, ids))
    model.export(tmp_path / "saved", verbose=False)
    loaded = tf.saved_model.load(tmp_path / "saved")
    np.testing.assert_allclose(loaded.serve((ids, ids)), logits, rtol=1e-3, atol=1e-3)


@pytest.mark.slow
def test_transformer_under_mirrored_strategy():
    """Keras builds the model from the mean of the replicas' batches, which is float."""
    printed = run_python(
        """
        import keras, numpy as np, tensorflow as tf
        from keras_layers import Transformer
        [cpu] = tf.config.list_physical_devices("CPU")
        two = [tf.config.LogicalDeviceConfiguration()] * 2
        tf.config.set_logical_device_configuration(cpu, two)
        ids = np.random.default_rng(0).integers(3, 30, (8, 6))
        mirrored = tf.distribute.MirroredStrategy(["/cpu:0", "/cpu:1"])
        losses = []
        for strategy in (tf.distribute.get_strategy(), mirrored):
            keras.utils.set_random_seed(0)
            with strategy.scope():
                model = Transformer(30, 30, 1, 1, 8, 16, 2, num_experts=4, moe_every=1,
                                    moe_options={"router": {
                                        "second_expert_policy": "all"}},
                                    dropout=0.1, seed=1)
                loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
                model.compile("sgd", loss, jit_compile=False)
            history = model.fit((ids, ids), ids, batch_size=8, epochs=2,
                                shuffle=False, verbose=0)
            evaluated = model.evaluate((ids, ids), ids, batch_size=8, verbose=0)
            losses.append([*history.history["loss"], *evaluated])
        np.testing.assert_allclose(*losses, rtol=1e-5)
        print(losses[0][0] != losses[0][1])
        """
    )
    assert printed.split() == ["True"]
