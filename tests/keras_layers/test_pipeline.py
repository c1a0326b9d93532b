"""A pipeline of stages and microbatches is the stack without them."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from parity import assert_close, assert_same_state, run_on_mesh, run_plain

import gshard_tf
from keras_layers import EncoderBlock, Transformer, greedy_decode
from keras_layers.stacked import Stacked

RTOL = 1e-5
B, L, M, UNITS, K = 8, 4, 8, 4, 4
STAGES = gshard_tf.AxisRules({"stage": "stage"})
MOE = {
    "router": {"kind": "top_k", "bias_update_rate": 0.01, "jitter": 0.1},
    "z_loss_coef": 0.01,
    "dropout": 0.1,
}


def stack(microbatches, units=UNITS, **arguments):
    keras.utils.set_random_seed(5)

    def make(repetition):
        number = repetition + 1
        options = {"seed": number, "name": f"block_{number}", **arguments}
        block = EncoderBlock(2, 4, 16, **options)
        block.build((None, None, M))
        return [block]

    return Stacked(make, units, True, microbatches, name="stack")


def model_of(microbatches, optimizer="sgd", **arguments):
    middle = stack(microbatches, **arguments)
    model = keras.Sequential([keras.layers.Masking(), keras.layers.Dense(M), middle])
    if optimizer == "sgd":
        # Its slots are the gradients.
        optimizer = keras.optimizers.SGD(0.1, momentum=0.9)
    model.compile(optimizer, "mse")
    return model


def vectors():
    x = np.random.default_rng(0).normal(size=(B, L, M)).astype("float32")
    x[:3, 2:] = 0.0
    return x


def fit(model):
    data = tf.data.Dataset.from_tensors((vectors(), vectors())).repeat(2)
    return model.fit(data, verbose=0).history


@pytest.fixture(scope="module")
def on_stages():
    return run_on_mesh(
        lambda: model_of(K, dropout=0.2), fit, {"stage": 4}, rules=STAGES
    )


def test_stages_train_as_the_stack(on_stages):
    plain = run_plain(lambda: model_of(None, dropout=0.2), fit)
    assert_close(on_stages.result, plain.result, RTOL, "logs")
    assert_same_state(on_stages.model, plain.model, RTOL)


def test_each_tick_sends_one_microbatch_to_the_next_stage(on_stages):
    (program,) = on_stages.strategy.programs
    large = [each for each in program.collectives() if each.bytes > 64]
    shifts = [each for each in large if each.kind == "collective-permute"]
    # Forward and backward.
    assert [each.times for each in shifts] == [K + 4 - 1] * 2
    assert {each.bytes for each in shifts} == {4 * B // K * L * M}
    pairs = [sorted(map(tuple, each.pairs)) for each in shifts]
    assert pairs == [[(0, 1), (1, 2), (2, 3)], [(1, 0), (2, 1), (3, 2)]]
    # Outputs of the last stage, and the inputs' gradient of the first, go to all.
    others = [each for each in large if each not in shifts]
    assert [(each.kind, each.times) for each in others] == [("all-reduce", 1)] * 2
    assert all(each.bytes == 4 * B * L * M for each in others)


def test_each_device_stores_its_stage(on_stages):
    (program,) = on_stages.strategy.programs
    sizes = [
        (whole, local)
        for name, whole, local in program.argument_bytes()
        if "block_1" in name and "seed" not in name
    ]
    assert len(sizes) > 10
    assert all(whole == 4 * local for whole, local in sizes)


@pytest.mark.slow
def test_losses_and_state_are_of_all_microbatches():
    """Those of the stack for one microbatch after another; a bias moves once."""
    arguments = {"units": 2, "num_experts": 4, "moe_options": MOE, "dropout": 0.2}
    x, k = tf.constant(vectors()), 2
    pipe, whole = stack(k, **arguments), stack(None, **arguments)
    pipe.build(), whole.build()

    def results(layer):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = layer(x, training=True)
            loss = tf.reduce_sum(y**2) + tf.add_n(layer.losses)
        sources = [x, *(w.value for w in layer.trainable_weights)]
        return y, loss, tape.gradient(loss, sources)

    assert_close(
        tf.nest.map_structure(np.asarray, tf.function(results)(pipe)),
        tf.nest.map_structure(np.asarray, tf.function(results)(whole)),
        RTOL,
        "results",
    )
    for ours, theirs in zip(
        pipe.stacked_variables(), whole.stacked_variables(), strict=True
    ):
        assert_close(ours.numpy(), theirs.numpy(), RTOL, ours.path)


@pytest.mark.slow
def test_balance_of_microbatches_with_padding_is_their_mean():
    k, options = 2, {"router": "top_k"}  # nothing random
    arguments = {
        "units": 1,
        "num_experts": 4,
        "moe_options": options,
        "dropout": 0.0,
    }
    x = tf.constant(vectors())
    mask = tf.reduce_any(x != 0, -1)
    pipe, whole = stack(k, **arguments), stack(None, **arguments)

    @tf.function
    def outputs_and_losses():
        return pipe(x, mask=mask, training=True), pipe.losses

    y, found = outputs_and_losses()
    losses = []
    for number in range(k):
        part = whole(x[number::k], mask=mask[number::k], training=True)
        np.testing.assert_allclose(y[number::k], part, atol=1e-5)
        losses.append(float(whole.losses[-1]))
    np.testing.assert_allclose(found[-1], np.mean(losses), rtol=RTOL)


def test_what_does_not_divide_is_an_error():
    with pytest.raises(ValueError, match="batch must divide by `microbatches`"):
        stack(3, units=1)(vectors())
    mesh = gshard_tf.create_mesh({"stage": 4})
    with (
        gshard_tf.use_mesh(mesh, STAGES),
        pytest.raises(ValueError, match="The 2 units of 'stack' .* 4 stages"),
    ):
        stack(4, units=2)(vectors())
    dropless = stack(K, units=1, num_experts=2, moe_options={"dispatcher": "dropless"})
    with pytest.raises(ValueError, match="manual region .* XlaCallModule"):
        tf.function(dropless)(vectors())


def transformer(microbatches, **arguments):
    keras.utils.set_random_seed(3)
    model = Transformer(
        20,
        20,
        **{
            "num_encoder_layers": 2,
            "num_decoder_layers": 2,
            "model_dim": M,
            "hidden_dim": 16,
            "num_heads": 2,
            "dropout": 0.2,
            "seed": 1,
            "stacked": True,
            "remat": True,
            "microbatches": microbatches,
            **arguments,
        },
    )
    model.build()
    model.compile(
        keras.optimizers.SGD(0.1, momentum=0.9),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    return model


def ids(segments=False):
    source, target = np.random.default_rng(0).integers(3, 20, (2, B, L))
    source[:2, 3:] = 0
    target[5:, 2:] = 0
    if not segments:
        return source, target
    return (
        source,
        target,
        *(np.cumsum(x % 3 == 0, 1) + (x > 0) for x in (source, target)),
    )


def fit_ids(segments=False):
    inputs = ids(segments)
    data = tf.data.Dataset.from_tensors((inputs, inputs[1])).repeat(2)
    return lambda model: model.fit(data, verbose=0).history


def test_a_model_has_the_variables_of_the_stack(tmp_path):
    pipe, whole = transformer(2), transformer(None)
    ours, theirs = (
        [(v.path.partition("/")[2], v.shape) for v in model.variables]
        for model in (pipe, whole)
    )
    assert ours == theirs
    copy = Transformer.from_config(pipe.get_config())
    assert copy.get_config() == pipe.get_config()
    assert copy.decoder_stack.microbatches == 2
    with pytest.raises(ValueError, match="without stacked=True and remat=True"):
        transformer(2, remat=False)
    # Decoding passes through the layers one by one.
    ours, log_prob = greedy_decode(pipe, ids()[0], 3, 1, 2)
    theirs, expected = greedy_decode(whole, ids()[0], 3, 1, 2)
    np.testing.assert_array_equal(ours, theirs)
    np.testing.assert_allclose(log_prob, expected, rtol=1e-5)


@pytest.mark.slow  # steps of a whole Transformer
@pytest.mark.parametrize(
    ("mesh", "rules", "segments"),
    [
        (None, None, False),
        ({"stage": 2}, {"stage": "stage"}, True),
        ({"stage": 2, "data": 2}, {"stage": "stage", "batch": "data"}, False),
    ],
)
def test_a_transformer_trains_as_the_stack(mesh, rules, segments):
    use = fit_ids(segments)
    plain = run_plain(lambda: transformer(None), use)
    if mesh is None:
        run = run_plain(lambda: transformer(4), use)
    else:
        rules = gshard_tf.AxisRules(rules)
        run = run_on_mesh(lambda: transformer(4), use, mesh, rules=rules)
    assert_close(run.result, plain.result, RTOL, "logs")
    # Gradients are sums over devices and microbatches: in another order.
    assert_same_state(run.model, plain.model, 2 * RTOL)


@pytest.mark.slow  # steps of a whole Transformer
@pytest.mark.parametrize(
    ("mesh", "units"),
    [({"stage": 2, "data": 2, "expert": 2}, 2), ({"stage": 4, "expert": 2}, 4)],
)
def test_stages_with_experts_and_data(mesh, units):
    arguments = {"num_experts": 4, "moe_options": MOE, "dropout": 0.2, "units": units}
    names = {"stage": "stage", "expert": "expert", "batch": "data", "group": "data"}
    if "data" not in mesh:
        names |= {"batch": "expert", "group": "expert"}
    run = run_on_mesh(
        lambda: model_of(4, **arguments), fit, mesh, rules=gshard_tf.AxisRules(names)
    )
    # The balance of microbatches with padding is their mean, on one device, too.
    plain = run_plain(lambda: model_of(4, **arguments), fit)
    assert_close(run.result, plain.result, RTOL, "logs")
    assert_same_state(run.model, plain.model, RTOL)
    (program,) = run.strategy.programs
    # Of two rows XLA gathers one's activations rather than sum the weights' gradient.
    activations = 4 * B // 4 * L * M
    found = [each for each in program.collectives() if each.bytes > activations]
    assert found and not [each for each in found if each.kind == "all-gather"]


@pytest.mark.slow  # two more steps
def test_mixed_precision_keeps_master_weights():
    keras.config.set_dtype_policy("mixed_bfloat16")
    runs = [run_plain(lambda k=k: model_of(k, dropout=0.2), fit) for k in (K, None)]
    assert_close(runs[0].result, runs[1].result, 1e-2, "logs")
    for weight in runs[0].model.trainable_weights:
        assert weight.dtype == "float32"
        value = weight.numpy()
        assert np.any(value != value.astype("bfloat16").astype("float32")), weight.path


@pytest.mark.slow  # calls a whole Transformer in several ways
def test_saving(tmp_path):
    model = transformer(2)
    inputs = tuple(tf.cast(x, tf.int32) for x in ids())
    expected = transformer(None)(inputs)
    model.save(tmp_path / "model.keras")
    copy = keras.saving.load_model(tmp_path / "model.keras", compile=False)
    np.testing.assert_allclose(tf.function(copy)(inputs), expected, atol=1e-5)
    model.save_weights(tmp_path / "model.weights.h5")
    other = transformer(None, seed=2)
    other.load_weights(tmp_path / "model.weights.h5")
    np.testing.assert_allclose(other(inputs), expected, atol=1e-5)
    signature = [tuple([tf.TensorSpec([None, L], tf.int32)] * 2)]
    model.export(tmp_path / "saved", input_signature=signature, verbose=False)
    loaded = tf.saved_model.load(str(tmp_path / "saved"))
    np.testing.assert_allclose(loaded.serve(inputs), expected, atol=1e-5)


@pytest.mark.slow  # compiles three steps
def test_bubbles_and_memory_are_those_of_the_schedule():
    batch, length, wide, units = 16, 32, 64, 4

    def plan(stages, microbatches):
        def build():
            keras.utils.set_random_seed(5)

            def make(repetition):
                name = f"block_{repetition + 1}"
                block = EncoderBlock(2, 32, 256, dropout=0.0, name=name)
                block.build((None, None, wide))
                return [block]

            layer = Stacked(make, units, True, microbatches, name="stack")
            first = keras.layers.Dense(wide)
            model = keras.Sequential([keras.Input((length, wide)), first, layer])
            model.compile(keras.optimizers.SGD(0.1, momentum=0.9), "mse")
            return model

        x = tf.TensorSpec([batch, length, wide], tf.float32)
        return gshard_tf.plan(
            build, f"cpu:{stages}", {"stage": stages}, STAGES, (x, x), cache=False
        )

    def kept(stages, microbatches):
        """Bytes of the inputs of all units of a stage, those of bubbles too."""
        ticks = microbatches + stages - 1
        return ticks * units // stages * (batch // microbatches) * length * wide * 4

    one, inputs = plan(1, 8), 2 * batch * length * wide * 4
    for stages, microbatches in ((4, 8), (4, 4)):
        found = plan(stages, microbatches)
        bubble = (stages - 1) / (microbatches + stages - 1)
        assert found.flops == pytest.approx(one.flops / stages / (1 - bubble), rel=0.02)
        assert [p.bubble for p in found.pipelines] == [bubble]
        assert f"stack: 4 stages, {microbatches} microbatches" in str(found)
        # The first layer has no stages.
        whole = (one.memory.arguments - inputs) / stages
        assert found.memory.arguments - inputs == pytest.approx(whole, rel=0.1)
        saved = one.memory.temporaries - found.memory.temporaries
        assert saved > kept(1, 8) - kept(stages, microbatches)
        assert gshard_tf.Plan.from_json(found.to_json()) == found
