"""The bias that balances the load: when it moves, by how much, and by which load."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from parity import run_on_mesh, run_plain
from processes import run_python

from keras_layers import MoELayer, TopKRouter, Transformer
from keras_layers.routing.balancing import bias_direction

RATE = 0.01
OPTIONS = {"kind": "top_k", "scores": "sigmoid", "bias_update_rate": RATE}


def uneven(*shape, seed=0):
    """Inputs that are not centred: a new router asks for few experts."""
    x = np.random.default_rng(seed).normal(size=shape) + 0.7
    return x.astype("float32")


def model_of(optimizer, **compile_options):
    inputs = keras.Input((16, 8))
    moe = MoELayer(4, 8, router=OPTIONS, seed=0, name="moe")
    model = keras.Model(inputs, keras.layers.Dense(1)(moe(inputs)))
    model.compile(optimizer, "mse", **(compile_options or {"jit_compile": False}))
    return model


def test_each_expert_moves_towards_its_share():
    load = tf.constant([4.0, 1.0, 3.0, 0.0, 2.0])
    np.testing.assert_array_equal(bias_direction(load), [-1, 1, -1, 1, 0])
    # Of 7 tokens for three experts; the others have no share.
    load = tf.constant([4.0, 0.0, 3.0, 0.0, 0.0])
    np.testing.assert_array_equal(bias_direction(load, [1, 3]), [-1, 0, -1, 0, 1])


@pytest.mark.parametrize("masked", [[], [0, 1, 2, 3]])
def test_open_experts_become_even(masked):
    x = uneven(4, 256, 16)
    keras.utils.set_random_seed(1)
    router = TopKRouter(
        8, 1, "dropless", scores="sigmoid", bias_update_rate=RATE, masked_experts=masked
    )
    router.build(x.shape)

    @tf.function
    def step():
        return router(x, training=True)[0].load(None)

    def busiest(load):
        load = np.delete(load, masked)
        return load.max() / load.mean()

    first = step().numpy()
    for _ in range(150):
        last = step().numpy()
    assert busiest(first) > 1.8
    assert busiest(last) < 1.15
    assert np.all(router.bias.numpy()[masked] == 0)


def test_masked_experts_leave_room_and_metrics_to_the_others():
    """A layer of 8 experts, 4 of them masked, is one of 4."""
    x = uneven(2, 12, 6)
    alike = {"router_metrics": "all", "seed": 0, "name": "moe"}
    small = MoELayer(4, 5, router={"capacity_factor": 0.8}, **alike)
    large = MoELayer(
        8, 5, router={"capacity_factor": 0.8, "masked_experts": [0, 3, 4, 7]}, **alike
    )
    keep = [1, 2, 5, 6]
    for layer in (small, large):
        layer.build(x.shape)
    for ours, theirs in zip(
        (large.experts.wi, large.experts.wo), (small.experts.wi, small.experts.wo),
        strict=True,
    ):  # fmt: skip
        ours.assign(np.insert(theirs.numpy(), [0, 2, 2, 4], 9.0, axis=0))
    kernel = np.full((6, 8), 9.0)
    kernel[:, keep] = small.router.kernel.numpy()
    large.router.kernel.assign(kernel)
    large.router.seed_generator.state.assign(small.router.seed_generator.state)
    expected, found = small(x, training=True), large(x, training=True)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(large.losses, small.losses, rtol=1e-5)
    theirs = small.health.result()
    for name, value in large.health.result().items():
        np.testing.assert_allclose(value, theirs[name], rtol=1e-5, err_msg=name)


@pytest.mark.parametrize("stacked", [False, True])
def test_a_frozen_layer_stands_still(stacked):
    ids = np.random.default_rng(0).integers(3, 20, (4, 8))
    model = Transformer(
        20, 20, 1 + stacked, 1, 8, 8, 2, num_experts=4, moe_every=1, stacked=stacked,
        moe_options={"router": OPTIONS},
    )  # fmt: skip
    model.build()
    biases = [v for v in model.variables if v.path.endswith("router/bias")]
    assert biases
    model.trainable = False
    model((ids, ids), training=True)
    assert not any(np.any(v.numpy()) for v in biases)
    model.trainable = True
    model((ids, ids), training=True)
    assert all(np.abs(v.numpy()).max() == np.float32(RATE) for v in biases)


def test_it_moves_once_for_each_update_of_the_weights():
    x = uneven(8, 16, 8)
    whole = model_of(keras.optimizers.SGD(0.1), run_eagerly=True)
    parts = model_of(
        keras.optimizers.SGD(0.1, gradient_accumulation_steps=4), run_eagerly=True
    )
    parts.set_weights(whole.get_weights())
    whole.fit(x, x[..., :1], batch_size=4, epochs=2, verbose=0, shuffle=False)
    parts.fit(x, x[..., :1], batch_size=1, epochs=2, verbose=0, shuffle=False)
    assert int(parts.optimizer.iterations) == 4
    expected = whole.get_layer("moe").router.bias.numpy()
    assert np.abs(expected).max() > RATE
    np.testing.assert_array_equal(parts.get_layer("moe").router.bias, expected)


@pytest.mark.slow
def test_micro_batches_on_a_mesh_are_those_of_one_device():
    x = uneven(16, 16, 8)

    def make():
        return model_of(keras.optimizers.SGD(0.1, gradient_accumulation_steps=2))

    def use(model):
        model.fit(x, x[..., :1], batch_size=4, epochs=1, verbose=0, shuffle=False)
        return model.get_layer("moe").router.bias.numpy()

    plain, meshed = run_plain(make, use), run_on_mesh(make, use, 4)
    assert np.abs(plain.result).max() > RATE
    np.testing.assert_array_equal(meshed.result, plain.result)


def test_a_loop_of_ones_own_says_how_many_it_accumulates():
    x = uneven(8, 16, 8)
    router = TopKRouter(4, bias_update_rate=RATE, bias_update_every=2)
    other = TopKRouter(4, bias_update_rate=RATE)
    for each in (router, other):
        each.build(x.shape)
    other.kernel.assign(router.kernel)
    router(x[:3], training=True)
    np.testing.assert_array_equal(router.bias, np.zeros(4))
    # Neither evaluation nor the end of an epoch counts.
    router(x, training=False)
    router.load_so_far.reset_state()
    router(x[3:], training=True)
    other(x, training=True)
    np.testing.assert_array_equal(router.bias, other.bias)
    assert np.any(router.bias.numpy() != 0)
    np.testing.assert_array_equal(router.load_so_far.load, np.zeros(4))
    config = router.get_config()
    assert config["bias_update_every"] == 2
    with pytest.raises(ValueError, match="Received: bias_update_every=0"):
        TopKRouter(4, bias_update_every=0)


def test_files_of_weights_hold_the_bias_alone():
    router = model_of("sgd").get_layer("moe").router
    assert [v.name for v in router.weights] == ["kernel", "bias"]


def test_replicas_have_one_bias():
    """Two replicas of a mirrored strategy, with half of the batch each."""
    printed = run_python(
        """
        import numpy as np, tensorflow as tf, keras
        cpu = tf.config.list_physical_devices("CPU")[0]
        two = [tf.config.LogicalDeviceConfiguration()] * 2
        tf.config.set_logical_device_configuration(cpu, two)
        from keras_layers import MoELayer
        x = np.random.default_rng(0).normal(size=(8, 16, 8)).astype("float32")
        router = {"kind": "top_k", "scores": "sigmoid", "bias_update_rate": 1e-2}

        def run(strategy):
            keras.utils.set_random_seed(0)
            with strategy.scope():
                inputs = keras.Input((16, 8))
                moe = MoELayer(4, 16, router=router)
                model = keras.Model(inputs, keras.layers.Dense(1)(moe(inputs)))
                model.compile(keras.optimizers.SGD(0.1), "mse", run_eagerly=True)
            model.fit(x, x[..., :1], batch_size=4, epochs=2, verbose=0, shuffle=False)
            value = moe.router.bias.value
            copies = [np.asarray(v) for v in getattr(value, "values", [value])]
            return copies, moe.router.kernel.numpy()

        [bias], kernel = run(tf.distribute.get_strategy())
        copies, kernels = run(tf.distribute.MirroredStrategy(["/cpu:0", "/cpu:1"]))
        assert len(copies) == 2 and np.abs(bias).max() > 0.015
        for copy in copies:
            np.testing.assert_array_equal(copy, bias)
        np.testing.assert_allclose(kernels, kernel, rtol=1e-4, atol=1e-6)
        print("equal")
        """
    )
    assert printed.strip().endswith("equal")
