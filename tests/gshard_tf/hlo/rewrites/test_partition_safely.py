"""What XLA's partitioner gets wrong is right through the strategy.

Each fault is shown through `SpmdStrategy`, beside eager TensorFlow on one device. That
the partitioner still has it is a test too: once it fails, the rewrite can go.
"""

import contextlib
import functools
from importlib.metadata import version

import keras
import numpy as np
import parity
import pytest
import tensorflow as tf
from partitioner_faults import (
    FAULTS,
    ROWS,
    SPATIAL,
    arguments,
    batch,
    depthwise,
    height,
    on,
    values,
    with_gradients,
)

import gshard_tf
from gshard_tf.hlo.rewrites import SafeModule
from gshard_tf.spmd import program

# Large enough to tell a wrong sum from rounding, for losses that bend.
RTOL = 1e-4


def differences(operation, mesh, rules, *x, gradients=True):
    """Largest relative difference to one device of each result, and the program."""
    strategy = gshard_tf.SpmdStrategy(
        gshard_tf.create_mesh(mesh), gshard_tf.AxisRules(rules)
    )
    step = with_gradients(operation) if gradients else operation
    got = strategy.run(tf.function(step, autograph=False), args=x)
    pairs = zip(tf.nest.flatten(got), tf.nest.flatten(step(*x)), strict=True)
    found = [parity.relative_difference(ours, plain) for ours, plain in pairs]
    return max(found), strategy.programs[-1]


@contextlib.contextmanager
def without_rewrites(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(program, "partition_safely", lambda hlo, *_: SafeModule(hlo))
        yield


@pytest.mark.parametrize("fault", FAULTS)
def test_right_on_a_mesh(fault):
    operation, mesh, rules, *given = FAULTS[fault]
    x = arguments(given)
    assert differences(operation, mesh, rules, *x, gradients=fault != "sums")[0] < RTOL


@pytest.mark.parametrize("fault", FAULTS)
def test_the_compiler_still_needs_it(fault, monkeypatch):
    operation, mesh, rules, *given = FAULTS[fault]
    x = arguments(given)
    with without_rewrites(monkeypatch):
        error, _ = differences(operation, mesh, rules, *x, gradients=fault != "sums")
        assert error > 0.01, (
            "This compiler is right without the rewrite. Where the oldest supported "
            "one is too, the rewrite can go."
        )


@pytest.mark.parametrize("fault", FAULTS)
def test_replicating_is_right_where_nothing_is_rewritten(fault, monkeypatch):
    # What the warning of tpu_strategy says to do.
    operation, mesh, rules, *given = FAULTS[fault]
    operation = functools.partial(operation, keep=gshard_tf.replicate)
    x = arguments(given)
    with without_rewrites(monkeypatch):
        error, _ = differences(operation, mesh, rules, *x, gradients=fault != "sums")
    assert error < RTOL


@pytest.mark.parametrize("rows", [1, 5, 8, 12])
@pytest.mark.parametrize("mesh", [{"data": 8}, {"data": 2, "model": 4}], ids=str)
def test_grouped_convolutions_of_any_batch(mesh, rows):
    x, w = values(rows, 6, 6, 4), values(3, 3, 1, 8, seed=1)

    def both(x, w):
        return tf.nn.depthwise_conv2d(
            tf.nn.conv2d(batch(x), w, 1, "SAME"),
            tf.reshape(w, [3, 3, 8, 1]),
            [1, 2, 2, 1],
            "VALID",
        )

    assert differences(both, mesh, {"batch": "data"}, x, w)[0] < RTOL


def test_a_grouped_convolution_gathers_no_batch():
    x, w = values(16, 8, 8, 4), values(3, 3, 4, 1, seed=1)
    error, compiled = differences(depthwise, {"data": 8}, {"batch": "data"}, x, w)
    assert error < RTOL
    kinds = {c.kind for c in compiled.collectives()}
    assert kinds == {"all-reduce"}  # of the kernel's gradient


def test_a_plain_convolution_stays_split_by_height():
    x, w = values(2, 32, 8, 4), values(3, 3, 4, 4, seed=1)
    error, compiled = differences(
        lambda x, w: height(tf.nn.conv2d(height(x), w, 1, "SAME")), *SPATIAL, x, w
    )
    assert error < RTOL
    kinds = {c.kind for c in compiled.collectives()}
    assert "collective-permute" in kinds  # of the rows beside a shard
    largest = max(
        int(np.prod(shape))
        for c in compiled.collectives()
        for _, shape in c.shapes
        if c.kind == "all-gather"
    )
    # What is gathered is a result of the step, no image on the way.
    assert largest <= 2 * 32 * 8 * 4


def test_a_convolution_behind_split_channels_does_not_abort():
    rules = {"batch": "data", "channels": "model"}

    def operation(x, w):
        x = on("batch", None, None, "channels")(x)
        return tf.nn.depthwise_conv2d(x, w, [1, 1, 1, 1], "VALID")

    x, w = values(1, 2, 2, 8), values(2, 2, 8, 2, seed=1)
    assert differences(operation, {"data": 2, "model": 4}, rules, x, w)[0] < RTOL


@pytest.mark.broad(2)
@pytest.mark.parametrize("batch_size", [8, 6])
def test_a_mobile_network_equals_plain_keras(batch_size):
    """Two steps of depthwise, separable, grouped convolutions and overlapping pools."""
    layers = keras.layers

    def make():
        x = inputs = keras.Input((16, 16, 3))
        x = layers.Conv2D(8, 3, strides=2, padding="same", activation="relu")(x)
        y = layers.Conv2D(16, 1)(x)
        y = layers.DepthwiseConv2D(3, padding="same", activation="relu")(y)
        x = x + layers.Conv2D(8, 1)(y)
        x = layers.MaxPooling2D(3, strides=1)(x)
        x = layers.SeparableConv2D(8, 3, depth_multiplier=2)(x)
        x = layers.Conv2D(12, 3, groups=4)(x)
        x = layers.GlobalAveragePooling2D()(x)
        model = keras.Model(inputs, layers.Dense(1)(x))
        model.compile(keras.optimizers.SGD(0.1, momentum=0.9), "mse")
        return model

    x = values(2 * batch_size, 16, 16, 3).numpy()
    y = values(2 * batch_size, 1, seed=1).numpy()
    _, meshed = parity.assert_equal_runs(
        make,
        lambda model: model.fit(x, y, batch_size=batch_size, shuffle=False, verbose=0),
        mesh={"data": 2, "model": 2},
    )
    described = str(meshed.strategy.describe(meshed.model))
    assert "\n* 9 grouped convolutions split the batch alone" in described


def test_uneven_scatters_of_several_dimensions():
    def operation(x):
        rows = on("batch", "length", None)(on("batch", "length", None)(x) * 2.0)
        ids = tf.reshape(tf.range(33) * 7 % 11, [3, 11, 1])
        return tf.scatter_nd(ids, rows, [11, 4])

    mesh, rules = {"data": 2, "model": 4}, {"batch": "data", "length": "model"}
    assert differences(operation, mesh, rules, values(3, 11, 4))[0] < RTOL


@pytest.mark.parametrize("reduce", ["sum", "max", "min", "prod"])
def test_segments_of_every_reduction(reduce):
    reduction = getattr(tf.math, f"unsorted_segment_{reduce}")

    def operation(x):
        rows = on("rows", None)(on("rows", None)(x) + 2.0)
        return reduction(rows, tf.range(11) % 3, 3)

    assert differences(operation, *ROWS, values(11, 4))[0] < RTOL


@pytest.mark.parametrize("rank", [1, 2])
@pytest.mark.parametrize("axes", [("rows", None, None), (None, "rows", None)], ids=str)
def test_fourier_transforms_of_split_arrays(axes, rank):
    transform = {1: tf.signal.fft, 2: tf.signal.fft2d}[rank]

    def operation(x):
        x = tf.cast(on(*axes)(x), tf.complex64)
        return tf.math.imag(transform(x)) * 0.1

    mesh = {"data": 2, "model": 2}
    assert differences(operation, mesh, {"rows": "data"}, values(2, 8, 11))[0] < RTOL


def test_modules_that_need_nothing_stay_as_they_are():
    strategy = gshard_tf.SpmdStrategy(gshard_tf.create_mesh({"data": 8}))
    strategy.run(tf.function(lambda x: x @ x, autograph=False), args=(values(8, 8),))
    hlo = strategy.programs[-1].step.hlo
    safe = program.partition_safely(hlo, {"data": 8})
    assert safe.hlo is hlo
    assert not safe.notes


def test_what_the_partitioner_cannot_compile_is_a_sentence():
    # Ids and the width of the rows over one axis, the result over another.
    def rows(x, ids):
        h = gshard_tf.annotate(x, (None, "a"))
        h = tf.gather(h, gshard_tf.annotate(ids, ("a",)))
        return gshard_tf.annotate(h, ("b", "a"))

    with pytest.raises(
        tf.errors.InvalidArgumentError,
        match=r"replicate.*Received: .*Gather.* on the mesh",
    ):
        differences(
            rows,
            {"a": 2, "b": 4},
            {"a": "a", "b": "b"},
            values(8, 8),
            tf.constant([0, 3, 1, 7, 2, 2, 5, 6]),
        )


def _every_other_row(x):
    return gshard_tf.replicate(on("rows", None)(x)[::2])


def _added_at_split_vectors(x, updates):
    at = on("rows", "columns")(tf.constant([[3]]))
    return on("columns", None)(tf.tensor_scatter_nd_add(x, at, updates))


SMALL = {
    "one row of two": (_every_other_row, (2, 6)),
    "index vectors": (_added_at_split_vectors, (10, 7), (1, 7)),
}


# The 0.x of jaxlib that have them, of 0.9, 0.10 and 0.12.
SEEN = {"one row of two": (10, 12), "index vectors": (9, 10)}


@pytest.mark.parametrize("fault", SMALL)
def test_small_programs_that_the_fuzzer_found(fault, monkeypatch):
    operation, *shapes = SMALL[fault]
    mesh = {"data": 2, "model": 4}
    rules = {"rows": "data", "columns": "model"}
    x = [values(*shape, seed=i) for i, shape in enumerate(shapes)]
    assert differences(operation, mesh, rules, *x)[0] < RTOL
    if int(version("jaxlib").split(".")[1]) not in SEEN[fault]:
        return
    with without_rewrites(monkeypatch):
        assert differences(operation, mesh, rules, *x)[0] > 0.01, "no longer needed"
