"""A function of jax in TensorFlow: the promise of `compat.tf_call_module`."""

import gc
import weakref

import jax
import jax.numpy as jnp
import keras
import numpy as np
import pytest
import tensorflow as tf

from gshard_tf.compat.tf_call_module import jax_call


def _product(x, w, ids):
    """`[B, M]`, `[E, M, H]` and `[B]` -> `[B, H]`, and the ids plus 1."""
    return {"y": jnp.tanh(jnp.einsum("bm,bmh->bh", x, w[ids])), "ids": ids + 1}


def _plain(x, w, ids):
    chosen = tf.einsum("be,emh->bmh", tf.one_hot(ids, 2, dtype=w.dtype), w)
    return tf.tanh(tf.einsum("bm,bmh->bh", x, chosen))


def _arguments(dtype="float32"):
    rng = np.random.default_rng(0)
    x, w = rng.normal(size=[6, 3]), rng.normal(size=[2, 3, 4])
    ids = rng.integers(0, 2, 6).astype("int32")
    return tf.constant(x, dtype), tf.constant(w, dtype), tf.constant(ids)


def _gradients(fn, x, w, ids):
    with tf.GradientTape() as outer:
        outer.watch([x, w])
        with tf.GradientTape() as tape:
            tape.watch([x, w])
            loss = tf.reduce_sum(fn(x, w, ids) ** 2)
        first = tape.gradient(loss, [x, w])
        penalty = tf.reduce_sum(first[0] ** 2)
    return loss, *first, *outer.gradient(penalty, [x, w])


@pytest.mark.parametrize("jit_compile", [None, False, True])
def test_values_and_two_orders_of_gradients_are_those_of_tensorflow(jit_compile):
    def ours(x, w, ids):
        outputs = jax_call(_product, x, w, ids)
        assert outputs["ids"].dtype == tf.int32 and outputs["y"].shape[1:] == (4,)
        return outputs["y"]

    def run(*tensors):
        return _gradients(ours, *tensors)

    if jit_compile is not None:
        x, w, ids = _arguments()
        free = [tf.TensorSpec([None, 3]), w, tf.TensorSpec([None], ids.dtype)]
        run = tf.function(run, jit_compile=jit_compile).get_concrete_function(*free)
    expected = _gradients(_plain, *_arguments())
    for a, b in zip(run(*_arguments()), expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_dtypes_are_kept(dtype):
    x, w, ids = _arguments(dtype)
    with tf.GradientTape() as tape:
        tape.watch([x, ids])
        y = jax_call(_product, x, w, tf.cast(ids, tf.int64))["y"]
    gradient, none = tape.gradient(y, [x, ids])
    assert y.dtype == gradient.dtype == x.dtype and none is None
    np.testing.assert_allclose(
        tf.cast(y, tf.float32), tf.cast(_plain(x, w, ids), tf.float32), rtol=0.05
    )


def test_a_keras_model_trains_and_its_saved_model_computes_the_same(tmp_path):
    class Layer(keras.layers.Layer):
        def build(self, shape):
            self.w = self.add_weight(shape=[shape[-1], 5], name="w")

        def call(self, x):
            return jax_call(lambda x, w: jnp.tanh(x @ w), x, self.w)

    model = keras.Sequential([keras.Input([3]), Layer(), keras.layers.Dense(1)])
    model.compile(keras.optimizers.SGD(0.1), "mse")
    x = np.random.default_rng(0).normal(size=[8, 3]).astype("float32")
    losses = model.fit(x, x[:, :1], epochs=3, verbose=0).history["loss"]
    assert losses[2] < losses[1] < losses[0]
    model.export(tmp_path, verbose=False)
    loaded = tf.saved_model.load(tmp_path)
    expected = model.predict(x[:5], verbose=0)
    np.testing.assert_allclose(loaded.serve(x[:5]), expected, rtol=1e-5)


def test_a_program_for_another_platform_is_lowered_by_its_rules():
    def fn(x):
        return jax.lax.platform_dependent(x, tpu=jnp.sin, default=jnp.cos)

    def opcodes(platform):
        step = tf.function(
            lambda x: jax_call(fn, x, platform=platform), jit_compile=True
        )
        return step.experimental_get_compiler_ir(tf.ones([2]))(stage="hlo")

    assert " sine(" in opcodes("tpu") and " cosine(" not in opcodes("tpu")
    assert " cosine(" in opcodes("cpu")


def test_other_unknown_dimensions_are_refused():
    @tf.function(input_signature=[tf.TensorSpec([2, None])])
    def step(x):
        return jax_call(jnp.sin, x)

    with pytest.raises(ValueError, match="must have static shapes"):
        step.get_concrete_function()


@pytest.mark.parametrize(
    "fn",
    [
        lambda x: jax.vmap(lambda y: jax.lax.psum(y, "n"), axis_name="n")(x[None]),
        lambda x: x.reshape(8, -1),
    ],
    ids=["psum", "reshape"],
)
def test_a_function_that_needs_an_unknown_batch_size_says_so(fn):
    @tf.function(input_signature=[tf.TensorSpec([None, 3])], autograph=False)
    def step(x):
        return jax_call(fn, x)

    with pytest.raises(ValueError, match="Give keras.Input a batch_size") as caught:
        step.get_concrete_function()
    assert len(str(caught.value)) < 500


def test_a_function_is_traced_once_for_its_shapes_and_not_kept():
    traces = []

    def fn(x):
        traces.append(x.shape)
        return jnp.sin(x)

    for size in (2, 2, 3, 2):
        jax_call(fn, tf.ones([size]))
    assert traces == [(2,), (3,)]
    kept = weakref.ref(fn)
    del fn
    gc.collect()
    assert kept() is None


def test_arguments_that_are_not_read():
    def second(x, y):
        return 2 * y

    x, y = tf.ones([2]), tf.ones([3])
    with tf.GradientTape() as tape:
        tape.watch([x, y])
        result = jax_call(second, x, y)
    np.testing.assert_array_equal(result, [2, 2, 2])
    gradients = tape.gradient(result, [x, y])
    np.testing.assert_array_equal(gradients[0], [0, 0])
    np.testing.assert_array_equal(gradients[1], [2, 2, 2])


def test_modules_are_written_for_an_older_tensorflow():
    graph = tf.function(lambda x: jax_call(jnp.sin, x)).get_concrete_function(
        tf.TensorSpec([2])
    )
    [call] = [op for op in graph.graph.get_operations() if op.type == "XlaCallModule"]
    assert b"StableHLO_v1.10.0" in call.get_attr("module")
