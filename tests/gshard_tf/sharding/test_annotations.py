import re

import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorflow.experimental import dtensor

import gshard_tf

MESH = gshard_tf.create_mesh({"data": 4, "model": 2})
RULES = gshard_tf.AxisRules(
    {"batch": "data", "group": "data", "expert": "data", "mlp": "model"}
)

# One of each, splitting a [16, 8] tensor 4 ways along its first dimension or whole.
ANNOTATIONS = {
    "split": lambda x: gshard_tf.split(x, 0, 4),
    "replicate": gshard_tf.replicate,
    "shard layout": lambda x: gshard_tf.shard(
        x, dtensor.Layout(["data", dtensor.UNSHARDED], MESH)
    ),
    "shard devices": lambda x: gshard_tf.shard(x, np.arange(8).reshape(4, 2)),
    "annotate": lambda x: gshard_tf.annotate(x, ("batch", "mlp")),
}
HLO = {
    "split": "devices=[4,1,2]0,1,2,3,4,5,6,7 last_tile_dim_replicate",
    "replicate": "replicated",
    "shard layout": "devices=[4,1,2]0,1,2,3,4,5,6,7 last_tile_dim_replicate",
    "shard devices": "devices=[4,2]0,1,2,3,4,5,6,7",
    "annotate": "devices=[4,2]0,1,2,3,4,5,6,7",
}
each_annotation = pytest.mark.parametrize("name", ANNOTATIONS)


def hlo(fn, *specs):
    """The HLO of `fn`, traced for `MESH`, before any optimisation."""
    with gshard_tf.use_mesh(MESH, RULES):
        compiled = tf.function(fn, jit_compile=True, autograph=False)
        return compiled.experimental_get_compiler_ir(*specs)(stage="hlo")


def shardings(fn, *specs):
    """The shardings that `fn` puts into its HLO, in order."""
    return re.findall(
        r'custom_call_target="Sharding", sharding=\{(.*?)\}', hlo(fn, *specs)
    )


def spec(*shape):
    return tf.TensorSpec(shape, tf.float32)


@each_annotation
def test_writes_the_sharding_into_the_program(name):
    assert shardings(ANNOTATIONS[name], spec(16, 8)) == [HLO[name]]


@pytest.mark.parametrize("dimension", [1, -1])
def test_split_splits_the_dimension_that_is_named(dimension):
    some = shardings(lambda x: gshard_tf.split(x, dimension, 4), spec(16, 8))
    assert some == ["devices=[1,4,2]0,1,2,3,4,5,6,7 last_tile_dim_replicate"]
    all_of_them = shardings(lambda x: gshard_tf.split(x, dimension, 8), spec(16, 8))
    assert all_of_them == ["devices=[1,8]0,1,2,3,4,5,6,7"]


@each_annotation
def test_gradient_carries_the_annotation(name):
    def gradient(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = ANNOTATIONS[name](x)
            loss = tf.reduce_sum(y**3)
        return tape.gradient(loss, x)

    assert shardings(gradient, spec(16, 8)) == [HLO[name]] * 2


@each_annotation
def test_changes_no_value_shape_or_gradient_on_one_device(name):
    # TensorFlow's own compiler knows the annotations and ignores them.
    annotation = ANNOTATIONS[name]
    x = tf.random.stateless_normal([16, 8], [1, 2])

    @tf.function(jit_compile=True, autograph=False)
    def value_and_gradient(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = annotation(x)
            loss = tf.reduce_sum(y**3)
        assert y.shape == x.shape and y.dtype == x.dtype
        return y, tape.gradient(loss, x)

    with gshard_tf.use_mesh(MESH, RULES):
        y, gradient = value_and_gradient(x)
    np.testing.assert_array_equal(y, x)
    np.testing.assert_allclose(gradient, 3 * x**2, rtol=1e-6)


@each_annotation
def test_is_the_identity_in_eager_mode_and_without_a_mesh(name):
    annotation = ANNOTATIONS[name]
    x = tf.ones([16, 8])
    assert annotation(x) is x
    with gshard_tf.use_mesh(MESH, RULES):
        assert annotation(x) is x
    traced = tf.function(annotation, autograph=False).get_concrete_function(x)
    assert not [op for op in traced.graph.get_operations() if "Sharding" in op.type]


@each_annotation
def test_keeps_unknown_dimensions(name):
    def static_shape(x):
        y = ANNOTATIONS[name](x)
        assert y.shape.as_list() == [None, 8]
        return y

    with gshard_tf.use_mesh(MESH, RULES):
        traced = tf.function(static_shape, autograph=False).get_concrete_function(
            spec(None, 8)
        )
    assert traced.structured_outputs.shape.as_list() == [None, 8]


@each_annotation
def test_reads_a_variable(name):
    variable = tf.Variable(tf.ones([16, 8]))
    weight = keras.Variable(tf.ones([16, 8]))
    annotation = ANNOTATIONS[name]
    assert shardings(lambda: annotation(variable) + annotation(weight)) == [
        HLO[name],
        HLO[name],
    ]
    with gshard_tf.use_mesh(MESH, RULES):
        assert annotation(variable) is variable
        assert annotation(weight) is weight


def test_dtypes():
    for dtype in (tf.bfloat16, tf.float16, tf.int32, tf.int64, tf.bool, tf.uint8):
        found = shardings(
            lambda x: gshard_tf.split(x, 0, 8), tf.TensorSpec([16], dtype)
        )
        assert found == ["devices=[8]0,1,2,3,4,5,6,7"]


# -- inside control flow -----------------------------------------------------------


def assert_same_on_and_off_the_mesh(fn, *args, expected):
    """`fn` compiles with annotations switched on, and computes what it should."""
    compiled = tf.function(fn, jit_compile=True, autograph=False)
    with gshard_tf.use_mesh(MESH, RULES):
        on = compiled(*args)
    off = tf.function(fn, autograph=False)(*args)
    for got in (on, off):
        np.testing.assert_allclose(got, expected, rtol=1e-6)


@each_annotation
def test_in_while_loop(name):
    annotation = ANNOTATIONS[name]

    def gradient(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = tf.while_loop(
                lambda i, y: i < 3,
                lambda i, y: (i + 1, annotation(y) * 2.0),
                (0, x),
                maximum_iterations=3,
            )[1]
            loss = tf.reduce_sum(y**2)
        return tape.gradient(loss, x)

    x = tf.random.stateless_normal([16, 8], [1, 2])
    assert_same_on_and_off_the_mesh(gradient, x, expected=128 * x)
    assert shardings(gradient, spec(16, 8)).count(HLO[name]) == 2


@each_annotation
def test_in_cond(name):
    annotation = ANNOTATIONS[name]

    def gradient(x, flag):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = tf.cond(flag, lambda: annotation(x) * 3.0, lambda: x)
            loss = tf.reduce_sum(y**2)
        return tape.gradient(loss, x)

    x = tf.random.stateless_normal([16, 8], [1, 2])
    assert_same_on_and_off_the_mesh(gradient, x, tf.constant(True), expected=18 * x)
    assert_same_on_and_off_the_mesh(gradient, x, tf.constant(False), expected=2 * x)
    flag = tf.TensorSpec([], tf.bool)
    assert shardings(gradient, spec(16, 8), flag).count(HLO[name]) == 2


@each_annotation
def test_in_recompute_grad(name):
    annotation = ANNOTATIONS[name]

    def gradient(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            block = tf.recompute_grad(lambda x: annotation(tf.sin(x)) ** 2)
            loss = tf.reduce_sum(block(x))
        return tape.gradient(loss, x)

    x = tf.random.stateless_normal([16, 8], [1, 2])
    compiled = tf.function(gradient, jit_compile=True, autograph=False)
    with gshard_tf.use_mesh(MESH, RULES):
        found = compiled(x)
    np.testing.assert_allclose(found, 2 * tf.sin(x) * tf.cos(x), rtol=1e-5, atol=1e-6)
    # Forward, once more for the backward pass, and the gradient.
    assert shardings(gradient, spec(16, 8)).count(HLO[name]) == 3


def test_in_a_python_loop_under_autograph():
    @tf.function(jit_compile=True)
    def doubled(x):
        for _ in tf.range(3):
            x = gshard_tf.annotate(x, ("batch", None)) * 2.0
        return x

    with gshard_tf.use_mesh(MESH, RULES):
        np.testing.assert_array_equal(doubled(tf.ones([16, 8])), 8 * np.ones([16, 8]))


# -- under Keras -------------------------------------------------------------------


@each_annotation
def test_in_functional_construction_and_shape_inference(name):
    annotation = ANNOTATIONS[name]
    assert annotation(keras.KerasTensor([16, 8])).shape == (16, 8)

    class Annotated(keras.layers.Layer):
        def call(self, x):
            return annotation(x) + 1.0

    with gshard_tf.use_mesh(MESH, RULES):
        inputs = keras.Input([8], batch_size=16)
        model = keras.Model(inputs, Annotated()(inputs))
        assert model.outputs[0].shape == (16, 8)
        found = keras.ops.shape(Annotated()(keras.KerasTensor([16, 8])))
    assert found == (16, 8)
    np.testing.assert_array_equal(model(tf.ones([16, 8])), 2 * np.ones([16, 8]))


def test_name_axes_records_the_names():
    weight = keras.Variable(np.zeros([4, 2, 3], "float32"))
    assert gshard_tf.logical_axes(weight) is None
    assert gshard_tf.name_axes(weight, ["expert", None, "mlp"]) is weight
    assert gshard_tf.logical_axes(weight) == ("expert", None, "mlp")
    with pytest.raises(ValueError, match=r"shape is \(4, 2, 3\).*Received: axes=\('e"):
        gshard_tf.name_axes(weight, ["expert", None])


# -- errors ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("annotation", "message"),
    [
        (lambda x: gshard_tf.split(x, 2, 4), r"\[-2, 2\).*split_dimension=2"),
        (lambda x: gshard_tf.split(x, -3, 4), r"\[-2, 2\).*split_dimension=-3"),
        (
            lambda x: gshard_tf.split(x, 0.0, 4),
            r"split_dimension` must be a whole.*0\.0",
        ),
        (lambda x: gshard_tf.split(x, 0, 3), r"divide the 8 devices.*partitions=3"),
        (lambda x: gshard_tf.split(x, 0, 16), r"divide the 8 devices.*partitions=16"),
        (lambda x: gshard_tf.split(x, 0, 0), r"at least 1. Received: 0"),
        (
            lambda x: gshard_tf.split(x, 0, 2.0),
            r"num_partitions` must be a whole.*2\.0",
        ),
        (lambda x: gshard_tf.annotate(x, ("batch",)), r"2 of them.*\('batch',\)"),
        (
            lambda x: gshard_tf.annotate(x, ("batch", None, "mlp")),
            r"2 of them.*\('batch', None, 'mlp'\)",
        ),
        (
            lambda x: gshard_tf.annotate(x, ("batch", "expert")),
            r"two dimensions of a tensor over the mesh axis 'data': 'batch' and 'exp",
        ),
        (
            lambda x: gshard_tf.shard(x, dtensor.Layout(["data"], MESH)),
            r"one spec per dimension: 2.*\['data'\]",
        ),
        (
            lambda x: gshard_tf.shard(
                x,
                dtensor.Layout(
                    ["expert", dtensor.UNSHARDED], gshard_tf.create_mesh({"expert": 8})
                ),
            ),
            r"\{'data': 4, 'model': 2\}. Received: \{'expert': 8\}",
        ),
        (lambda x: gshard_tf.shard(x, np.arange(8)), r"rank, 2.*shape=\(8,\)"),
        (lambda x: gshard_tf.shard(x, [[0, 1], [2, 3]]), r"each of the 8 devices"),
        (lambda x: gshard_tf.shard(x, [[0] * 4, [1] * 4]), r"each of the 8 devices"),
        (lambda x: gshard_tf.shard(x, np.zeros([4, 2])), r"whole numbers.*float64"),
    ],
)
def test_refuses(annotation, message):
    with pytest.raises(ValueError, match="(?s)" + message):
        shardings(annotation, spec(16, 8))


@pytest.mark.parametrize(
    "annotation",
    [
        lambda x: gshard_tf.split(x, 2, 4),
        lambda x: gshard_tf.split(x, 0, -1),
        lambda x: gshard_tf.annotate(x, ("batch",)),
        lambda x: gshard_tf.shard(x, np.arange(8)),
        lambda x: gshard_tf.shard(x, dtensor.Layout(["data"], MESH)),
    ],
)
def test_refuses_without_a_mesh_what_no_mesh_could_allow(annotation):
    with pytest.raises(ValueError, match="Received"):
        annotation(tf.ones([16, 8]))


def test_split_needs_a_known_rank():
    with pytest.raises(ValueError, match="known rank"):
        with gshard_tf.use_mesh(MESH, RULES):
            tf.function(lambda x: gshard_tf.split(x, 0, 8)).get_concrete_function(
                tf.TensorSpec(None, tf.float32)
            )


# -- dimensions that do not divide ---------------------------------------------------


@settings(max_examples=12)
@given(
    shape=st.lists(st.integers(1, 11), min_size=1, max_size=3),
    dimension=st.integers(0, 2),
    partitions=st.sampled_from([1, 2, 4, 8]),
)
def test_uneven_dimensions_give_right_numbers_on_the_mesh(shape, dimension, partitions):
    dimension %= len(shape)
    strategy = gshard_tf.SpmdStrategy(gshard_tf.create_mesh({"all": 8}))

    @tf.function
    def run(x):
        def step(x):
            y = gshard_tf.split(x, dimension, partitions)
            y = y * 2.0 + tf.reduce_sum(y, axis=dimension, keepdims=True)
            return gshard_tf.split(y, (dimension + 1) % len(shape), partitions)

        return strategy.run(step, args=(x,))

    x = np.random.default_rng(0).normal(size=shape).astype("float32")
    expected = x * 2 + x.sum(axis=dimension, keepdims=True)
    np.testing.assert_allclose(run(x), expected, rtol=1e-5, atol=1e-5)
