"""Operations that XLA's partitioner may get wrong are named before a program runs.

A program is a graph of TensorFlow's here: no TPU, and no strategy, is needed to inspect
one. The warnings of `tpu_strategy` are tested in a process of its own.
"""

import json
import warnings

import keras
import pytest
import tensorflow as tf
from partitioner_faults import FAULTS, arguments, batch, height, on, with_gradients
from tpu_scripts import run_script

import gshard_tf
from gshard_tf.sharding.mesh import use_mesh
from gshard_tf.tpu import partitioner_faults as faults

TWO_AXES = {"data": 2, "rows": 4}
RULES = {"batch": "data", "height": "rows", "heads": "rows"}
KINDS = {
    "depthwise kernel": faults.GROUPED,
    "grouped kernel": faults.GROUPED,
    "strided kernel": faults.SPLIT_IMAGE,
    "image on two axes": faults.SPLIT_IMAGE,
    "overlapping maxima": faults.MAXIMA,
    "sums": faults.SCATTER,
    "looked-up rows": faults.SCATTER,
}


def faults_of(step, *specs, mesh=TWO_AXES, rules=RULES):
    """The possible faults of a step: `{fault: [layers]}`."""
    with use_mesh(gshard_tf.create_mesh(mesh), gshard_tf.AxisRules(rules)):
        traced = tf.function(step, autograph=False).get_concrete_function(*specs)
    kinds = {}
    for fault, _, layer in faults.PartitionerFaults(mesh).find(
        traced.graph.get_operations()
    ):
        kinds.setdefault(fault, []).append(layer)
    return kinds


IMAGES, KERNEL = tf.TensorSpec([8, 16, 16, 4]), tf.TensorSpec([3, 3, 4, 4])


def convolved(x, w):
    return tf.nn.conv2d(x, w, 1, "SAME")


@pytest.mark.parametrize("fault", FAULTS)
def test_what_spmd_strategy_mends_is_found(fault):
    operation, mesh, rules, *given = FAULTS[fault]
    specs = [tf.TensorSpec(x.shape, x.dtype) for x in arguments(given)]
    step = with_gradients(operation) if fault != "sums" else operation
    assert list(faults_of(step, *specs, mesh=mesh, rules=rules)) == [KINDS[fault]]


@pytest.mark.parametrize("name", ["fft", "ifft2d", "rfft", "irfft3d"])
def test_fourier_transforms(name):
    real = name.startswith("rfft")
    x = tf.TensorSpec([8, 8, 8, 8], tf.float32 if real else tf.complex64)
    assert list(faults_of(getattr(tf.signal, name), x)) == [faults.FOURIER]


@pytest.mark.parametrize(
    "scatter",
    [
        lambda x: tf.math.segment_sum(x, tf.range(12) // 3),
        lambda x: tf.math.unsorted_segment_max(x, tf.range(12) % 5, 5),
        lambda x: tf.scatter_nd(tf.range(12)[:, None], x, [16, 4]),
        # (Of indices, the last dimension is one row's.)
        lambda x: tf.scatter_nd(tf.zeros([4, 2], tf.int32), x[:4, 0], [16, 4]),
        lambda x: tf.tensor_scatter_nd_add(x, tf.range(9)[:, None], x[:9]),
        lambda x: (
            tf.math.bincount(tf.cast(x[:, 0], tf.int32), minlength=5, maxlength=5)
            + tf.raw_ops.Bincount(
                arr=tf.cast(x[:, 0], tf.int32),
                size=5,
                weights=tf.constant([], tf.int32),
            )
        ),
        # As many rows as divide, of which annotations split 3 in two.
        lambda x: tf.math.unsorted_segment_sum(
            on("batch", None)(tf.reshape(x, [3, 16])), tf.zeros([3, 16], tf.int32), 4
        ),
    ],
)
def test_scatters_of_rows_that_do_not_divide(scatter):
    assert list(faults_of(scatter, tf.TensorSpec([12, 4]))) == [faults.SCATTER]


def test_in_a_variable_too():
    table = tf.Variable(tf.zeros([16, 4]))
    x = tf.TensorSpec([12, 4])

    def step(x):
        return table.scatter_add(tf.IndexedSlices(x, tf.range(12)))

    assert list(faults_of(step, x)) == [faults.SCATTER]


WAYS = {
    "on its way": lambda x: tf.nn.relu(height(x) * 2.0),
    "another convolution": lambda x: tf.nn.avg_pool2d(height(x), 2, 2, "SAME"),
    "tokens": lambda x: tf.reshape(
        on("batch", "height", None)(tf.reshape(x, [8, 256, 4])), [8, 16, 16, 4]
    ),
    "an einsum": lambda x: tf.einsum("bhwc,cd->bhwd", height(x), tf.ones([4, 4])),
    # [B, H, W, C] -> [H, W, B, C], split by width, and back
    "a transposition": lambda x: tf.transpose(
        height(tf.transpose(x, [1, 2, 0, 3])), [2, 0, 1, 3]
    ),
    "a function": lambda x: tf.function(lambda y: y + 1.0)(height(x)),
    "a loop": lambda x: tf.while_loop(
        lambda i, _: i < 2, lambda i, y: (i + 1, y * 2.0), (0, height(x))
    )[1],
}


@pytest.mark.parametrize("way", WAYS)
def test_an_annotation_reaches_a_convolution_by_way_of(way):
    def step(x, w):
        return convolved(WAYS[way](x), w)

    assert list(faults_of(step, IMAGES, KERNEL)) == [faults.SPLIT_IMAGE]


def test_an_annotation_behind_reaches_it_too():
    def step(x, w):
        return height(tf.nn.relu(convolved(x, w)))

    assert list(faults_of(step, IMAGES, KERNEL)) == [faults.SPLIT_IMAGE]


def test_channels_first():
    # Traced only: CPUs have no kernel for it.
    def step(x, w, annotated):
        x = on(*annotated)(tf.transpose(x, [0, 3, 1, 2]))
        return tf.nn.conv2d(x, w, 1, "SAME", data_format="NCHW")

    def by(*axes):
        return faults_of(lambda x, w: step(x, w, axes), IMAGES, KERNEL)

    assert by("batch", "height", None, None) == {}
    assert list(by("batch", None, "height", None)) == [faults.SPLIT_IMAGE]


def test_convolutions_without_strides_are_right_on_one_axis():
    def step(stride):
        return lambda x, w: tf.nn.conv2d(height(x), w, stride, "SAME")

    one = {"mesh": {"rows": 8}, "rules": {"height": "rows"}}
    assert faults_of(with_gradients(step(1)), IMAGES, KERNEL, **one) == {}
    assert list(faults_of(step(2), IMAGES, KERNEL, **one)) == [faults.SPLIT_IMAGE]


def heads(x, w):
    """A convolution behind attention: heads are split, and no image."""
    y = on("batch", None, "heads", None)(tf.reshape(x, [8, 16, 16, 4]))
    return convolved(tf.reshape(tf.reshape(y, [8, 16, 64]), [8, 4, 4, 64]), w)


RIGHT = {
    "images split by examples": (
        lambda x, w: tf.nn.max_pool2d(convolved(batch(x), w), 2, 2, "SAME"),
        (IMAGES, KERNEL),
    ),
    "split heads": (heads, (IMAGES, tf.TensorSpec([3, 3, 64, 4]))),
    "rows that divide": (
        lambda x: tf.gather(on("batch", None)(x), tf.range(24) % 8),
        (tf.TensorSpec([8, 4]),),
    ),
    "rows of two dimensions": (
        lambda x: tf.gather(x, tf.zeros([2, 12], tf.int32)),
        (tf.TensorSpec([8, 4]),),
    ),
}


@pytest.mark.parametrize("name", RIGHT)
def test_nothing_is_found_where_nothing_is_wrong(name):
    operation, specs = RIGHT[name]
    assert faults_of(with_gradients(operation), *specs) == {}


def test_layers_are_named():
    layers = keras.layers
    model = keras.Sequential(
        [
            layers.Embedding(9, 4, name="words"),
            layers.Conv1D(4, 3, groups=2, name="grouped"),
            layers.DepthwiseConv1D(2, name="apart"),
            layers.MaxPooling1D(3, 1, name="maxima"),
            layers.Flatten(),
            layers.Dense(1),
        ]
    )
    model.compile(keras.optimizers.SGD(), "mse")
    model.build([2, 9])
    model.optimizer.build(model.trainable_variables)

    def step(ids, y):
        with tf.GradientTape() as tape:
            loss = model.compute_loss(ids, y, model(ids, training=True))
        weights = model.trainable_variables
        gradients = tape.gradient(loss, [w.value for w in weights])
        return [tf.convert_to_tensor(g) for g in gradients]

    names = faults_of(step, tf.TensorSpec([2, 9], tf.int32), tf.TensorSpec([2, 1]))
    expected = {
        faults.SCATTER: ["words"],
        faults.GROUPED: ["grouped", "apart"],
        faults.MAXIMA: ["maxima"],
    }
    assert set(names) == set(expected)
    for fault, those in expected.items():
        for name, layer in zip(names[fault], those, strict=True):
            assert layer in name, names


def test_each_layer_is_warned_of_once():
    looked_at = faults.PartitionerFaults(TWO_AXES)

    def operations(name):
        def step(x):
            with tf.name_scope(name):
                return tf.signal.fft(x)

        spec = tf.TensorSpec([2, 8], tf.complex64)
        graph = tf.function(step, autograph=False).get_concrete_function(spec).graph
        return graph.get_operations()

    with pytest.warns(UserWarning, match="FFT in 'first': Fourier"):
        looked_at.warn_once(operations("first"))
    with pytest.warns(UserWarning) as caught:
        looked_at.warn_once(operations("second"))
    assert "FFT in 'second'" in str(caught[0].message)
    assert "first" not in str(caught[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        looked_at.warn_once(operations("first"))


def test_tpu_strategy_warns():
    run = run_script("warned.py", json.dumps({"data": 2, "model": 2}))
    [warning] = run["convolutions"]
    for kind, layer in [("DepthwiseConv2dNative", "depth"), ("MaxPoolGrad", "pool")]:
        assert f"{kind} in 'functional" in warning
        assert f"/{layer}" in warning
    assert "gshard_tf.replicate" in warning
    assert run["again"] == run["experts"] == run["one core"] == []
    # For any mesh: jax, which a region imports, would take the TPU from TensorFlow.
    for mesh in ("manual", "manual, one core"):
        assert "cannot be in a step of tpu_strategy" in run[mesh]
