"""Manual regions: what each device computes and sends is what the function says."""

import collections
import importlib.util

import jax.numpy as jnp
import keras
import numpy as np
import parity
import pytest
import tensorflow as tf
from jax import lax
from processes import run_python

import gshard_tf


def _experts(x, w):
    """A device's `[B, M]` and `[E, M, M]` -> `[B, M]`; token t goes to expert t mod E.

    And the mean of what the experts return, over all devices.
    """
    axis = gshard_tf.mesh_axis("expert")
    experts, m = w.shape[0] * lax.axis_size(axis), x.shape[1]
    y = x.reshape(-1, experts, m).swapaxes(0, 1)
    y = lax.all_to_all(y, axis, 0, 1, tiled=True)
    y = jnp.tanh(jnp.einsum("esm,emh->esh", y, w))
    y = lax.all_to_all(y, axis, 1, 0, tiled=True)
    mean = lax.pmean(y.mean(), gshard_tf.mesh_axis("batch"))
    return y.swapaxes(0, 1).reshape(-1, m), mean


_region = gshard_tf.manual(
    _experts, [("batch", None), ("expert", None, None)], (("batch", None), ())
)


def _experts_of_tensorflow(x, w):
    y = tf.reshape(x, [-1, w.shape[0], x.shape[1]])
    y = tf.tanh(tf.einsum("gem,emh->geh", y, w))
    return tf.reshape(y, x.shape), tf.reduce_mean(y)


class Experts(keras.layers.Layer):
    """The region as a layer: `[B, M]` -> the same."""

    def build(self, shape):
        w = self.add_weight(shape=[8, shape[-1], shape[-1]], name="w")
        self.w = gshard_tf.name_axes(w, ("expert", None, None))

    def call(self, x):
        y, mean = _region(x, tf.cast(self.w, x.dtype))
        self.add_loss(tf.cast(mean, tf.float32) ** 2)
        return y


def _model():
    layers = [keras.Input([4]), keras.layers.Dense(4), Experts(), keras.layers.Dense(1)]
    model = keras.Sequential(layers)
    model.compile("adam", "mse")
    return model


def _batch(size=64):
    x = np.random.default_rng(0).normal(size=[size, 4]).astype("float32")
    return x, x[:, :1]


def _kinds(program):
    return collections.Counter(each.kind for each in program.collectives())


def _use(model):
    data = tf.data.Dataset.from_tensors(_batch())  # so that shapes are static
    losses = model.fit(data, epochs=3, verbose=0).history["loss"]
    return losses, model.predict(data, verbose=0)


def test_training_equals_one_device_and_sends_what_the_region_says():
    plain, meshed = parity.assert_equal_runs(_model, _use)
    dense, experts, last = plain.model.layers
    y = _experts_of_tensorflow(dense(_batch()[0]), experts.w.value)[0]
    np.testing.assert_allclose(plain.result[1], last(y), rtol=1e-5, atol=1e-6)
    step, predict = meshed.strategy.programs
    # To the experts and back, and the same for the gradient; sums of the loss, the
    # mean and gradients.
    assert _kinds(step) == {"all-to-all": 4, "all-reduce": 2}
    assert _kinds(predict) == {"all-to-all": 2}
    assert "expert,-,-" in str(meshed.strategy.describe(meshed.model))


def _gradients(fn, x, w):
    with tf.GradientTape() as tape:
        tape.watch([x, w])
        y, mean = fn(x, w)
        loss = tf.reduce_sum(y**2) + mean
    return loss, *tape.gradient(loss, [x, w])


def test_gradients_are_those_of_tensorflow():
    x, w = tf.constant(_batch()[0]), tf.random.normal([8, 4, 4], seed=0)
    expected = _gradients(_experts_of_tensorflow, x, w)
    rules = gshard_tf.AxisRules({"batch": "data"})
    strategy = parity.strategy_of({"data": 2, "model": 2}, rules=rules)
    step = tf.function(lambda x, w: _gradients(_region, x, w))
    for found in (_gradients(_region, x, w), strategy.run(step, args=(x, w))):
        for a, b in zip(found, expected, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_a_gradient_may_need_nothing_but_the_place_of_the_device():
    """So a region that nothing enters computes what another one keeps for it."""

    def scaled(x):
        return x * (1.0 + lax.axis_index(gshard_tf.mesh_axis("batch")))

    region = gshard_tf.manual(scaled, [("batch", None)], ("batch", None))

    def gradient(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = region(x)
        return y, tape.gradient(y, x)

    strategy = parity.strategy_of(
        {"data": 4}, rules=gshard_tf.AxisRules({"batch": "data"})
    )
    x = tf.random.normal([8, 3], seed=0)
    y, d_x = strategy.run(tf.function(gradient), args=(x,))
    factor = np.repeat([1.0, 2.0, 3.0, 4.0], 2)[:, None]
    np.testing.assert_allclose(y, factor * x, rtol=1e-6)
    np.testing.assert_allclose(d_x, np.broadcast_to(factor, [8, 3]))


def test_it_is_planned_without_memory_or_devices():
    spec = tf.TensorSpec
    plan = gshard_tf.plan(_model, "cpu:8", batch=(spec([64, 4]), spec([64, 1])))
    [layer] = {c.layer for c in plan.communication if c.kind == "all-to-all"}
    assert "experts" in layer and plan.count("all-to-all", layer) == 4
    assert not plan.reshards


def _everything(x, ids):
    """Every kind of collective, over an axis that is split or is not."""
    axis = gshard_tf.mesh_axis("length")
    n = lax.axis_size(axis)
    ring = [(i, (i + 1) % n) for i in range(n)]
    x = lax.ppermute(x, axis, ring)
    x = lax.psum_scatter(lax.all_gather(x, axis, tiled=True), axis, tiled=True) / n
    x = x + lax.axis_index(axis) * (lax.psum(1.0, axis) - n)
    return x, lax.pmax(jnp.max(ids), axis), ids


@pytest.mark.parametrize("length", ["model", None])
def test_an_axis_without_a_rule_has_size_1(length):
    mesh = gshard_tf.create_mesh({"data": 4, "model": 2})
    rules = gshard_tf.AxisRules({"batch": "data", "length": length})
    axes = ("length", "batch")
    region = gshard_tf.manual(_everything, [axes, ("length",)], (axes, (), ("length",)))
    x, ids = tf.reshape(tf.range(32.0), [4, 8]), tf.range(4)
    strategy = gshard_tf.SpmdStrategy(mesh, rules)
    for dtype in (tf.float32, tf.bfloat16):
        y, largest, same = strategy.run(
            tf.function(region), args=(tf.cast(x, dtype), ids)
        )
        shift = 2 if length else 0
        np.testing.assert_array_equal(tf.cast(y, tf.float32), np.roll(x, shift, 0))
        assert largest == 3 and same.dtype == tf.int32
        # Without a rule, only the arguments move, to where the region wants them.
        kinds = _kinds(strategy.programs[-1])
        assert length or set(kinds) == {"all-to-all", "all-gather"}
    np.testing.assert_array_equal(region(x, ids)[0], x)


def test_an_unknown_batch_is_static_when_it_runs():
    strategy = parity.strategy_of(8)

    def half(x):  # a device's [B, M] -> [B / 2, M]
        return x.reshape(2, -1, x.shape[1]).sum(0)

    region = gshard_tf.manual(half, [("batch", None)], ("batch", None))
    with strategy.scope():
        model = keras.Sequential([keras.Input([4]), keras.layers.Lambda(region)])
    x = _batch(16)[0]
    found = model.predict(x, batch_size=16, verbose=0)
    np.testing.assert_allclose(found, x.reshape(8, 2, 4).sum(1), rtol=1e-6)


def test_errors():
    with pytest.raises(ValueError, match="must have, for each argument, one name"):
        gshard_tf.manual(jnp.sin, ("batch", None), ("batch", None))
    region = gshard_tf.manual(jnp.sin, [("batch", None)], ("batch", None))
    with pytest.raises(ValueError, match="must have 2 dimensions"):
        region(tf.ones([2]))
    with pytest.raises(ValueError, match="takes 1 tensors"):
        region(tf.ones([2, 2]), tf.ones([2]))
    with pytest.raises(ValueError, match="must be called in a function that"):
        gshard_tf.mesh_axis("expert")
    typo = gshard_tf.manual(
        lambda x: lax.psum(x, gshard_tf.mesh_axis("bach")), [("batch",)], ("batch",)
    )
    with pytest.raises(ValueError, match=r"must be one of the axes .*\['batch'\]"):
        typo(tf.ones([2]))
    with pytest.raises(ValueError, match="must divide by its 8 devices"):
        parity.strategy_of(8).run(tf.function(region), args=(tf.ones([12, 2]),))


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs libtpu: the extra aot"
)
def test_a_ragged_all_to_all_compiles_for_a_tpu():
    printed = run_python(
        """
        import jax, keras, tensorflow as tf
        from jax import lax, numpy as jnp
        import gshard_tf

        def exchange(x):
            axis = gshard_tf.mesh_axis("batch")
            devices, rows = lax.axis_size(axis), x.shape[0]
            if devices == 1:
                return x
            each = jnp.full([devices], rows // devices, jnp.int32)
            here = jnp.full([devices], lax.axis_index(axis), jnp.int32)
            return lax.ragged_all_to_all(
                x, jnp.zeros_like(x), jnp.cumsum(each) - each, each,
                here * (rows // devices), each, axis_name=axis,
            )

        class Exchange(keras.layers.Layer):
            def call(self, x):
                return gshard_tf.manual(exchange, [("batch", None)], ("batch", None))(x)

        def build():
            layers = [keras.Input([256]), keras.layers.Dense(256), Exchange()]
            model = keras.Sequential(layers, name="model")
            model.compile("sgd", "mse")
            return model

        x = tf.TensorSpec([512, 256])
        plan = gshard_tf.plan(build, "v5e:2x4", batch=(x, x), cache=False)
        print(plan.count("ragged-all-to-all"))
        """
    )
    assert printed.split()[-1] == "2"  # there, and the gradient back
