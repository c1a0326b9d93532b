"""A block computed again is the same block, and keeps less."""

import collections

import keras
import numpy as np
import pytest
import tensorflow as tf
from parity import assert_same_state, run_on_mesh, run_plain

import gshard_tf
from gshard_tf.spmd.abstract import AbstractStrategy, lower_abstract
from keras_layers import (
    EncoderBlock,
    MultiHeadAttention,
    Transformer,
    record_routing,
    replay_routing,
)

# All that has state, draws random numbers or adds a loss.
ROUTER = {
    "kind": "top_k",
    "bias_update_rate": 0.01,
    "jitter": 0.1,
    "capacity_factor": 1.0,
    "kernel_regularizer": "l2",
}
MOE = {"router": ROUTER, "z_loss_coef": 0.01, "dropout": 0.1}


def data(batch=8, length=32):
    source, target = np.random.default_rng(0).integers(3, 20, (2, batch, length))
    source[:3, length // 2 :] = 0
    return (source, target), target


def transformer(remat, **compile_options):
    model = Transformer(
        24,
        24,
        1,
        1,
        16,
        32,
        2,
        num_experts=8,
        moe_every=1,
        dropout=0.2,
        moe_options={**MOE, "router_metrics": "all"},
        remat=remat,
        seed=1,
    )
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(0.01), loss, **compile_options)
    return model


def fit(model):
    return model.fit(*data(), batch_size=8, epochs=2, verbose=0, shuffle=False).history


def blocks(remat, dense=0, **compile_options):
    options = {"dropout": 0.2, "seed": 1, "remat": remat}
    model = keras.Sequential(
        [
            keras.layers.Masking(),
            keras.layers.Dense(16),
            *(EncoderBlock(2, 8, 32, **options) for _ in range(dense)),
            EncoderBlock(2, 8, 32, num_experts=8, moe_options=MOE, **options),
        ]
    )
    model.compile(keras.optimizers.Adam(0.01), "mse", **compile_options)
    return model


def fit_blocks(model):
    x = np.random.default_rng(0).normal(size=(8, 32, 16)).astype("float32")
    x[:3, 20:] = 0.0
    return model.fit(x, x, batch_size=8, epochs=2, verbose=0, shuffle=False).history


@pytest.mark.parametrize(
    ("make", "use", "options", "policy"),
    [
        (transformer, fit, {"run_eagerly": True}, "float32"),
        pytest.param(
            *(blocks, fit_blocks, {"jit_compile": False}, "mixed_bfloat16"),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_training_is_the_same(make, use, options, policy):
    keras.config.set_dtype_policy(policy)
    plain = run_plain(lambda: make(False, run_eagerly=True), use)
    again = run_plain(lambda: make(True, **options), use)
    # Rounding differs by the order that a compiler chooses.
    rtol = 1e-5 if policy == "float32" else 0.02
    for name, values in plain.result.items():
        np.testing.assert_allclose(values, again.result[name], rtol=rtol, err_msg=name)
    # With seeds, counts and biases, each of which a second update would show in.
    assert_same_state(again.model, plain.model, 10 * rtol)


@pytest.fixture(scope="module")
def runs_on_mesh():
    """Without and with: the run, its program, its collectives."""
    found = []
    for remat in (False, True):
        run = run_on_mesh(lambda remat=remat: blocks(remat, dense=1), fit_blocks)
        (program,) = run.strategy.programs
        found.append((run, program, program.collectives()))
    return found


@pytest.mark.slow  # as a loop of blocks is, see test_stacked.py
def test_training_on_a_mesh_is_the_same(runs_on_mesh):
    (plain, _, _), (again, _, _) = runs_on_mesh
    for name, values in plain.result.items():
        np.testing.assert_allclose(values, again.result[name], rtol=1e-5, err_msg=name)
    assert_same_state(again.model, plain.model, 1e-4)


@pytest.mark.slow  # two steps; the loop of test_stacked.py counts collectives, too
def test_memory_falls_and_only_the_forward_pass_is_communicated_again(runs_on_mesh):
    (_, plain, before), (_, again, after) = runs_on_mesh

    def temporary(program):
        return program.compiled.memory_analysis().temp_size_in_bytes

    assert temporary(again) < 0.8 * temporary(plain)

    def kinds(found):
        return collections.Counter(c.kind for c in found)

    assert kinds(before)["all-to-all"] == 4
    assert kinds(after)["all-to-all"] == 6
    assert set(kinds(after)) == {"all-to-all", "all-reduce"}

    def reduced(found):
        return sum(c.bytes for c in found if c.kind == "all-reduce")

    # The counts of the balancing loss, not an activation.
    assert reduced(after) - reduced(before) < 100


def test_without_training_nothing_is_computed_again():
    x = tf.random.normal([2, 6, 8])
    counts = []
    for remat in (False, True, "attention"):
        block = EncoderBlock(2, 4, 8, num_experts=4, remat=remat)
        block.build(x.shape)
        graph = tf.function(block).get_concrete_function(x).graph
        counts.append(collections.Counter(op.type for op in graph.get_operations()))
    assert counts[0] == counts[1] == counts[2]


def test_losses_are_added_once_and_have_gradients():
    x = tf.random.normal([2, 6, 8])
    results = []
    for remat in (False, True):
        keras.utils.set_random_seed(0)
        block = EncoderBlock(
            2, 4, 8, num_experts=4, dropout=0.0, seed=1, remat=remat, moe_options=MOE
        )
        block.build(x.shape)
        with tf.GradientTape() as tape:
            block(x, training=True)
            losses = block.losses
            total = tf.add_n(losses)
        kernel = block.feed_forward.router.kernel
        results.append((len(losses), total, tape.gradient(total, kernel.value)))
    assert results[0][0] == results[1][0] == 3  # balancing, z-loss, regularizer
    np.testing.assert_allclose(results[0][1], results[1][1], rtol=1e-6)
    np.testing.assert_allclose(results[0][2], results[1][2], rtol=1e-5, atol=1e-7)
    assert np.any(np.abs(results[1][2]) > 1e-4)


def test_routing_is_recorded_and_replayed_once():
    model = transformer(True)
    inputs, _ = data(2, 8)
    with record_routing() as plans, tf.GradientTape() as tape:
        loss = tf.reduce_sum(model(inputs, training=True))
    tape.gradient(loss, [v.value for v in model.trainable_variables])
    assert {name: len(found) for name, found in plans.items()} == {
        "encoder_1_moe": 1,
        "decoder_1_moe": 1,
    }
    with replay_routing(plans), tf.GradientTape() as tape:
        loss = tf.reduce_sum(model(inputs, training=True))
    tape.gradient(loss, [v.value for v in model.trainable_variables])


@pytest.mark.slow  # as one of stacked blocks can, see test_stacked.py
def test_a_plan_without_memory_can_be_traced():
    mesh = gshard_tf.create_mesh({"expert": 8})
    strategy = AbstractStrategy(mesh)
    x = np.zeros([8, 8, 16], "float32")
    with strategy.scope():
        model = blocks(True)
        model.build(x.shape)
        model.optimizer.build(model.trainable_variables)
        model._symbolic_build(data_batch=(x, x))
    spec = tf.TensorSpec(x.shape, tf.float32)
    step = lower_abstract(strategy.extended, model.train_step, ((spec, spec),))
    updated = {step.captures[i].path for i in step.updates}
    trained = {v.path for v in model.trainable_variables}
    assert trained <= updated


def test_config():
    block = EncoderBlock(2, 4, 8, remat=True)
    assert EncoderBlock.from_config(block.get_config()).remat
    model = transformer(True)
    copy = Transformer.from_config(model.get_config())
    assert copy.remat and all(block.remat for block in copy.encoder_blocks)
    block = EncoderBlock(2, 4, 8, remat="attention")
    copy = EncoderBlock.from_config(block.get_config())
    assert copy.remat == "attention" and copy.self_attention.remat
    with pytest.raises(ValueError, match="remat must be one of.*'no'"):
        EncoderBlock(2, 4, 8, remat="no")


def attention_step(remat):
    """A function of inputs `[B, T, M]` and its gradients, and the layer."""
    layer = MultiHeadAttention(2, 4, dropout=0.3, seed=1, remat=remat)
    layer.build((None, None, 8))

    def step(x, mask):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = layer(x, mask=mask, causal=True, training=True)
            loss = tf.reduce_sum(tf.sin(y))
        return y, tape.gradient(loss, [x, *(w.value for w in layer.weights)])

    return layer, step


@pytest.mark.parametrize(
    "jit", [None, pytest.param(False, marks=pytest.mark.slow), True]
)
def test_attention_weights_computed_again_are_the_same(jit):
    x = tf.random.stateless_normal([3, 16, 8], [1, 2])
    mask = tf.range(16) < tf.constant([16, 9, 3])[:, None]
    results, states = [], []
    kernels = None
    for remat in (False, True):
        layer, step = attention_step(remat)
        kernels = kernels or layer.get_weights()
        layer.set_weights(kernels)
        if jit is not None:
            step = tf.function(step, jit_compile=jit, autograph=False)
        # Twice: another dropout mask the second time.
        results.append([tf.nest.flatten(step(x, mask)) for _ in range(2)])
        states.append(layer.dropout.seed_generator.state.numpy())
    np.testing.assert_array_equal(*states)
    for plain, again in zip(*results, strict=True):
        for a, b in zip(plain, again, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    assert np.abs(results[1][0][0] - results[1][1][0]).max() > 1e-3


def test_attention_weights_are_not_kept():
    """The compiled program keeps no `[B, N, T, L]` of each of several attentions."""
    temporary = []
    for remat in (False, True):
        layers = [attention_step(remat)[0] for _ in range(4)]

        @tf.function(autograph=False)
        def step(x, layers=layers):
            with tf.GradientTape() as tape:
                y = x
                for layer in layers:
                    y = y + layer(y, training=True)
                loss = tf.reduce_sum(tf.square(y))
            return tape.gradient(loss, [w.value for la in layers for w in la.weights])

        strategy = gshard_tf.SpmdStrategy(gshard_tf.create_mesh({"expert": 1}))
        with strategy.scope():
            layers[:] = [attention_step(remat)[0] for _ in range(4)]
            strategy.run(step, (np.ones([2, 256, 8], "float32"),))
        (program,) = strategy.programs
        temporary.append(program.compiled.memory_analysis().temp_size_in_bytes)
    weights = 4 * 2 * 2 * 256 * 256  # bytes of one attention's
    assert temporary[0] > 4 * weights
    assert temporary[1] < temporary[0] - 2 * weights
