"""Blocks in a loop over stacked weights are the same blocks, one after the other."""

import collections

import keras
import numpy as np
import pytest
import tensorflow as tf
from parity import assert_close, run_on_mesh, run_plain

import gshard_tf
from gshard_tf.spmd.abstract import AbstractStrategy, lower_abstract
from keras_layers import (
    EncoderBlock,
    Transformer,
    greedy_decode,
    record_routing,
    replay_routing,
    stack_weights,
    unstack_weights,
)
from keras_layers.stacked import Stacked

# All that has state, draws random numbers or adds a loss.
MOE = {
    "router": {
        "kind": "top_k",
        "bias_update_rate": 0.01,
        "jitter": 0.1,
        "kernel_regularizer": "l2",
    },
    "z_loss_coef": 0.01,
    "dropout": 0.1,
}


def transformer(compiled=True, jit_compile=False, run_eagerly=False, **arguments):
    defaults = {
        "num_encoder_layers": 4,
        "num_decoder_layers": 2,
        "model_dim": 16,
        "hidden_dim": 32,
        "num_heads": 2,
        "num_experts": 4,
        "moe_every": 2,
        "dropout": 0.2,
        "seed": 1,
    }
    if arguments.get("num_experts", 4):
        defaults["moe_options"] = MOE
    model = Transformer(20, 20, **{**defaults, **arguments})
    if compiled:
        model.compile(
            keras.optimizers.Adam(0.01),
            keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            jit_compile=jit_compile,
            run_eagerly=run_eagerly,
        )
    model.build()
    return model


def ids(batch=4, length=8):
    source, target = np.random.default_rng(0).integers(3, 20, (2, batch, length))
    source[:2, length // 2 :] = 0
    return source, target


def fit(model):
    inputs = ids()
    return model.fit(
        inputs, inputs[1], batch_size=4, epochs=2, verbose=0, shuffle=False
    ).history


def unrolled(model, **arguments):
    """A model that is not stacked, with the values of one that is."""
    copy = transformer(compiled=False, **arguments)
    unstack_weights(model, copy)
    return copy


def values(model):
    """Of weights and seeds, by place and name."""
    return {f"{i} {v.name}": v.numpy() for i, v in enumerate(model.variables)}


@pytest.mark.parametrize(
    ("options", "arguments"),
    [
        ({"run_eagerly": True}, {"num_encoder_layers": 1, "moe_every": 1}),
        # A loop, and a decoder in it.
        pytest.param(
            {"jit_compile": False},
            {
                "num_experts": None,
                "num_encoder_layers": 1,
                "num_decoder_layers": 2,
                "tie_output": False,
            },
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_stacked_transformer_trains_as_the_unrolled_one(options, arguments):
    plain = transformer(run_eagerly=True, **arguments)
    stacked = transformer(stacked=True, remat=True, **options, **arguments)
    stack_weights(plain, stacked)
    expected = fit(plain)
    # Same names in the logs, too.
    assert_close(fit(stacked), expected, 1e-4, "logs")
    model = unrolled(stacked, **arguments)
    assert_close(values(model), values(plain), 1e-4, "state")
    if "run_eagerly" in options:
        inputs = ids()
        logs = [
            model.evaluate(inputs, inputs[1], return_dict=True, verbose=0)
            for model in (stacked, plain)
        ]
        assert_close(*logs, 1e-4, "evaluation")


def test_every_layer_starts_as_it_would_by_itself():
    models = [transformer(compiled=False, stacked=s) for s in (False, True)]
    ours = values(unrolled(models[1]))
    theirs = values(models[0])
    assert list(ours) == list(theirs)
    for name, value in ours.items():
        # Random numbers are drawn in another order.
        np.testing.assert_allclose(value.std(), theirs[name].std(), 0.4, 1e-6, name)
        np.testing.assert_allclose(value.mean(), theirs[name].mean(), 0, 0.1, name)
    (wi,) = [
        w for w in models[1].weights if w.path.endswith("encoder_2_moe/experts/wi")
    ]
    assert wi.shape == (2, 4, 16, 32)
    assert np.abs(wi[0] - wi[1]).max() > 0.01


def blocks(stacked, remat=False, **compile_options):
    """Two times a dense block and one with experts, on vectors."""

    def make(repetition):
        made = []
        for experts in (None, 8):
            number = 2 * repetition + len(made) + 1
            block = EncoderBlock(
                2,
                8,
                32,
                num_experts=experts,
                moe_options=MOE if experts else None,
                dropout=0.2,
                seed=number,
                name=f"block_{number}",
            )
            block.build((None, None, 16))
            made.append(block)
        return made

    middle = [Stacked(make, 2, remat, name="stack")] if stacked else make(0) + make(1)
    model = keras.Sequential([keras.layers.Masking(), keras.layers.Dense(16), *middle])
    model.compile(keras.optimizers.Adam(0.01), "mse", **compile_options)
    return model


def fit_blocks(model):
    x = np.random.default_rng(0).normal(size=(8, 16, 16)).astype("float32")
    x[:3, 10:] = 0.0
    return model.fit(x, x, batch_size=8, epochs=2, verbose=0, shuffle=False).history


@pytest.fixture(scope="module")
def plain_blocks():
    keras.config.set_dtype_policy("float32")
    return run_plain(lambda: blocks(False, run_eagerly=True), fit_blocks)


def check_blocks(run, plain, rtol):
    assert_close(run.result, plain.result, rtol, "logs")
    stack = run.model.layers[-1]
    for j, variable in enumerate(stack.stacked_variables()):
        for i in range(2):
            other = plain.model.layers[2 + 2 * i : 4 + 2 * i]
            ours = [v for block in other for v in block.weights]
            known = {id(v) for v in ours}
            ours += [v for b in other for v in b.variables if id(v) not in known]
            ours += [v for block in other for v in block.metrics_variables]
            assert_close(variable.numpy()[i], ours[j].numpy(), rtol, variable.path)


@pytest.mark.slow  # as a loop on a mesh does
def test_a_loop_of_blocks_trains_as_blocks_in_a_row(plain_blocks):
    run = run_plain(lambda: blocks(True, jit_compile=False), fit_blocks)
    check_blocks(run, plain_blocks, 1e-4)


@pytest.fixture(scope="module")
def blocks_on_mesh():
    keras.config.set_dtype_policy("float32")
    return run_on_mesh(lambda: blocks(True, True), fit_blocks)


def test_a_loop_of_blocks_on_a_mesh(plain_blocks, blocks_on_mesh):
    check_blocks(blocks_on_mesh, plain_blocks, 1e-4)


def test_communication_is_that_of_one_unit_whatever_the_count(blocks_on_mesh):
    (program,) = blocks_on_mesh.strategy.programs
    found = collections.Counter(c.kind for c in program.collectives())
    # Two forward in one loop; two again and two backward in the other.
    assert found["all-to-all"] == 6
    assert set(found) == {"all-to-all", "all-reduce"}


def test_each_device_holds_its_experts_of_every_layer(blocks_on_mesh):
    (program,) = blocks_on_mesh.strategy.programs
    sizes = {
        name: (whole, local)
        for name, whole, local in program.argument_bytes()
        if "experts" in name and "seed" not in name
    }
    # wi and wo, and two slots of Adam for each.
    assert len(sizes) == 6
    for name, (whole, local) in sizes.items():
        assert whole == 4 * 2 * 8 * 16 * 32, name
        assert local == whole // 8, name


def test_mixed_precision_keeps_master_weights():
    keras.config.set_dtype_policy("mixed_bfloat16")
    model = transformer(
        stacked=True,
        remat=True,
        num_decoder_layers=1,
        num_encoder_layers=1,
        moe_every=1,
        run_eagerly=True,
    )
    before = [w.numpy() for w in model.trainable_weights]
    assert np.all(np.isfinite(fit(model)["loss"]))
    for old, weight in zip(before, model.trainable_weights, strict=True):
        assert weight.dtype == "float32"
        # Not rounded to bfloat16 on the way.
        new = weight.numpy()
        assert np.any(new != old) and np.any(new != new.astype("bfloat16")), weight.path


def test_weights_do_not_take_the_dtype_of_a_layer_around():
    def make(repetition):
        block = EncoderBlock(2, 4, 8)
        block.build((None, None, 8))
        return [block]

    stack = Stacked(make, 2)
    with keras.src.backend.AutocastScope("bfloat16"):
        stack.build()
    assert {w.dtype for w in stack.weights} == {"float32"}


def test_decoding_is_that_of_the_unrolled_model():
    model = transformer(compiled=False, stacked=True)
    other = unrolled(model)
    source, _ = ids()
    ours, log_prob = greedy_decode(model, source, 4, 1, 2)
    theirs, expected = greedy_decode(other, source, 4, 1, 2)
    np.testing.assert_array_equal(ours, theirs)
    np.testing.assert_allclose(log_prob, expected, rtol=1e-5)


def test_stack_weights_is_the_way_back():
    keras.utils.set_random_seed(0)
    other = transformer(compiled=False)
    model = transformer(compiled=False, stacked=True)
    assert np.any(np.abs(model(ids()) - other(ids())) > 1e-3)
    stack_weights(other, model)
    np.testing.assert_allclose(model(ids()), other(ids()), atol=1e-5)
    with pytest.raises(ValueError, match="stacked=True for the unrolled"):
        stack_weights(model, other)
    with pytest.raises(ValueError, match="Received: 2 blocks"):
        stack_weights(transformer(compiled=False, num_encoder_layers=2), model)
    with pytest.raises(ValueError, match="Received: .* only in one"):
        stack_weights(transformer(compiled=False, hidden_dim=16), model)


def test_saving(tmp_path):
    model = transformer(compiled=False, stacked=True, remat=True)
    expected = model(ids())
    model.save(tmp_path / "model.keras")
    copy = keras.saving.load_model(tmp_path / "model.keras")
    assert copy.get_config() == model.get_config()
    assert copy.stacked and copy.encoder_stack.remat
    np.testing.assert_allclose(copy(ids()), expected, atol=1e-6)
    paths = [weight.path for weight in model.weights]
    assert len(set(paths)) == len(paths)
    assert not [path for path in paths if "seed" in path]
    model.save_weights(tmp_path / "model.weights.h5")
    keras.utils.set_random_seed(99)
    fresh = transformer(compiled=False, stacked=True)
    fresh.load_weights(tmp_path / "model.weights.h5")
    np.testing.assert_allclose(fresh(ids()), expected, atol=1e-6)


def operations(graph):
    """What a graph and all functions that it calls are made of."""
    definition = graph.as_graph_def()
    functions = (function.node_def for function in definition.library.function)
    return collections.Counter(
        node.op
        for nodes in (definition.node, *functions)
        for node in nodes
        # Zeros of few elements are another operation than zeros of many.
        if node.op not in ("Const", "Fill")
    )


@pytest.mark.slow  # nor do its collectives, see above
def test_the_graph_does_not_grow_with_depth():
    sizes = []
    for layers in (2, 6):
        model = transformer(
            compiled=False,
            stacked=True,
            remat=True,
            num_experts=None,
            num_encoder_layers=layers,
            num_decoder_layers=1,
        )

        @tf.function
        def gradients(source, target, model=model):
            with tf.GradientTape() as tape:
                loss = tf.reduce_sum(model((source, target), training=True))
            return tape.gradient(loss, [v.value for v in model.trainable_variables])

        spec = tf.TensorSpec([2, 4], tf.int64)
        sizes.append(operations(gradients.get_concrete_function(spec, spec).graph))
    assert sizes[0] == sizes[1]


def test_a_plan_without_memory_can_be_traced():
    strategy = AbstractStrategy(gshard_tf.create_mesh({"expert": 8}))
    x = np.zeros([8, 8, 1024], "float32")

    def make(repetition):
        # Half a terabyte: whoever makes a literal of that shape ends here.
        block = EncoderBlock(
            2, 8, 65536, 2048, moe_options=MOE, seed=repetition, name="block"
        )
        block.build(x.shape)
        return [block]

    with strategy.scope():
        model = keras.Sequential([keras.layers.Masking(), Stacked(make, 1, remat=True)])
        model.compile("adam", "mse")
        model.build(x.shape)
        model.optimizer.build(model.trainable_variables)
        model._symbolic_build(data_batch=(x, x))
    spec = tf.TensorSpec(x.shape, tf.float32)
    step = lower_abstract(strategy.extended, model.train_step, ((spec, spec),))
    updated = {step.captures[i].path for i in step.updates}
    assert {v.path for v in model.trainable_variables} <= updated


def test_routing_is_recorded_eagerly_or_not_at_all():
    model = transformer(compiled=False, stacked=True, remat=True, dropout=0.0)
    with record_routing() as plans:
        first = model(ids())
    assert {name: len(found) for name, found in plans.items()} == {
        "encoder_2_moe": 2,
        "decoder_2_moe": 1,
    }
    with replay_routing(plans):
        again = model(ids())
    np.testing.assert_allclose(again, first, atol=1e-5)
    with pytest.raises(ValueError, match="Received: 'encoder' called in a graph"):
        with record_routing():
            tf.function(model)(ids())


def test_bad_arguments():
    with pytest.raises(ValueError, match="Received: num_encoder_layers=3"):
        transformer(stacked=True, num_encoder_layers=3)
    with pytest.raises(ValueError, match="Received: .*count=0"):
        Stacked(lambda i: [], 0)

    def unlike(repetition):
        block = EncoderBlock(2, 4, 8 + repetition)
        block.build((None, None, 8))
        return [block]

    with pytest.raises(ValueError, match="same weights. Received: .*8, 9"):
        Stacked(unlike, 2)
