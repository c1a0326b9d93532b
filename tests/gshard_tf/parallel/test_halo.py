"""Windows over split images: values and gradients of TensorFlow on one device."""

import numpy as np
import parity
import pytest
import tensorflow as tf

import gshard_tf
from gshard_tf import (
    halo_average_pool,
    halo_convolution,
    halo_max_pool,
    halo_transposed_convolution,
)

C, FILTERS = 4, 3
RULES = {"batch": "b", "height": "y", "width": "x"}
MESHES = [
    {"y": 4, "x": 2},
    {"y": 8},
    {"b": 2, "y": 2, "x": 2},
    {"b": 2, "y": 4},
    {"y": 3, "x": 2},
    {"x": 5},
]


def _strategy(mesh):
    rules = {name: axis for name, axis in RULES.items() if axis in mesh}
    return parity.strategy_of(mesh, rules=gshard_tf.AxisRules(rules))


def _gradients(fn, x, kernel):
    with tf.GradientTape() as tape:
        tape.watch([x, kernel])
        y = fn(x, kernel)
        loss = tf.reduce_sum(tf.sin(y))
    gradients = tape.gradient(loss, [x, kernel], unconnected_gradients="zero")
    return y, *gradients


def _draw(kind, rng):
    """Ours, TensorFlow's, and the shapes of images and kernel, of random sizes."""

    def sizes(low, high):
        return [int(size) for size in rng.integers(low, high, 2, endpoint=True)]

    images = [int(rng.choice([2, 2, 3])), *sizes(9, 24), C]
    size, strides, dilations = sizes(1, 5), sizes(1, 3), sizes(1, 2)
    padding = str(rng.choice(["same", "valid"]))
    upper = padding.upper()
    kernel = [*size, C, FILTERS]
    if kind == "convolution":
        return (
            lambda x, w: halo_convolution(x, w, strides, dilations, padding),
            lambda x, w: tf.nn.conv2d(x, w, strides, upper, dilations=dilations),
            images,
            kernel,
        )
    if kind == "depthwise":
        # TensorFlow has strides of a square, and either strides or dilation.
        stride = strides[0]
        dilations = dilations if stride == 1 else [1, 1]

        def grouped(x, w):
            w = tf.reshape(w, [*size, 1, C * FILTERS])
            return halo_convolution(x, w, [stride] * 2, dilations, padding, C)

        def depthwise(x, w):
            every = (1, stride, stride, 1)
            return tf.nn.depthwise_conv2d(x, w, every, upper, dilations=dilations)

        return grouped, depthwise, images, kernel
    if kind == "transposed":
        output = []
        for n, k, s, d in zip(images[1:3], size, strides, dilations, strict=True):
            more = int(rng.integers(0, s))  # several sizes become n
            valid = (n - 1) * s + (k - 1) * d + 1 + more
            output.append(n * s - more if padding == "same" else valid)

        def transposed(x, w):
            return tf.nn.conv2d_transpose(
                x, w, [images[0], *output, FILTERS], strides, upper, dilations=dilations
            )

        return (
            lambda x, w: halo_transposed_convolution(
                x, w, output, strides, dilations, padding
            ),
            transposed,
            images,
            [*size, FILTERS, C],
        )
    ours, plain = {
        "maxima": (halo_max_pool, tf.nn.max_pool2d),
        "means": (halo_average_pool, tf.nn.avg_pool2d),
    }[kind]
    return (
        lambda x, w: ours(x, size, strides, padding),
        lambda x, w: plain(x, size, strides, upper),
        images,
        kernel,
    )


@pytest.mark.broad(16)
@pytest.mark.parametrize(
    ("kind", "seed"),
    [
        (kind, seed)
        for kind in ("convolution", "transposed", "maxima", "means", "depthwise")
        for seed in range(16)
    ],
)
def test_equals_tensorflow(kind, seed):
    rng = np.random.default_rng([seed, *kind.encode()])
    ours, plain, *shapes = _draw(kind, rng)
    x, kernel = (tf.constant(rng.normal(size=shape), tf.float32) for shape in shapes)
    strategy = _strategy(MESHES[seed % len(MESHES)])

    @tf.function(autograph=False)
    def step(x, kernel):
        return _gradients(ours, x, kernel)

    found = strategy.run(step, args=(x, kernel))
    for a, b in zip(found, _gradients(plain, x, kernel), strict=True):
        assert a.shape == b.shape
        assert parity.relative_difference(a, b) < 1e-5


def _ones(*size):
    return tf.ones([*size, C, C])


ROW = 2 * 64 * C * 4  # bytes of a row of all images
SENT = {
    # 64 rows, of which 62 have windows. Two rows of the next device.
    "valid": (
        lambda x: halo_convolution(x, _ones(3, 3), padding="valid"),
        {"y": 8},
        2 * ROW,
    ),
    # 16 rows each way from neighbors that have 8: all of one, and all of the next.
    "from two away": (
        lambda x: halo_convolution(x, _ones(33, 1)),
        {"y": 8},
        32 * ROW,
    ),
    # A row each way of half the width, then columns of 16 rows and 2 corners.
    "corners": (
        lambda x: halo_convolution(x, _ones(3, 3)),
        {"y": 4, "x": 2},
        2 * ROW // 2 + 2 * 18 * ROW // 64,
    ),
    # Every second output sees two inputs: its own, and that above.
    "transposed": (
        lambda x: halo_transposed_convolution(x, _ones(3, 3), (128, 128), (2, 2)),
        {"y": 8},
        ROW,
    ),
    # Windows of 3 begin at every second row: one row of the next device.
    "means": (lambda x: halo_average_pool(x, (3, 3), (2, 2)), {"y": 8}, ROW),
    "without overlap": (
        lambda x: halo_max_pool(x, (2, 2), (2, 2), "valid"),
        {"y": 8},
        0,
    ),
}


@pytest.mark.parametrize(("fn", "mesh", "sent"), SENT.values(), ids=SENT)
def test_sends_halos_and_nothing_else(fn, mesh, sent):
    @tf.function(autograph=False)
    def step(x, scale):
        with tf.GradientTape() as tape:
            tape.watch(scale)
            images = gshard_tf.annotate(x, ("batch", "height", "width", None))
            loss = tf.reduce_sum(tf.sin(fn(images * scale)))
        return loss, tape.gradient(loss, scale)

    strategy = _strategy(mesh)
    strategy.run(step, args=(tf.ones([2, 64, 64, C]), tf.ones([C])))
    found = 0
    for each in strategy.programs[-1].collectives():
        if each.kind == "collective-permute":
            found += each.bytes
        else:  # sums of the loss and of the gradient
            assert (each.kind, each.bytes) == ("all-reduce", 4 + 4 * C)
    assert found == 2 * sent  # and the gradients go back


def test_output_size_must_fit_the_images():
    with pytest.raises(ValueError, match="`output_size` must be one of which"):
        halo_transposed_convolution(tf.ones([1, 3, 4, 1]), _ones(3, 3), (7, 8), (2, 2))


def test_padding_is_same_or_valid():
    with pytest.raises(ValueError, match="`padding` must be 'same' or 'valid'"):
        halo_max_pool(tf.ones([1, 3, 4, 1]), (2, 2), (2, 2), "causal")


def test_an_image_is_as_large_as_the_window():
    with pytest.raises(ValueError, match="must be as large as the window"):
        halo_max_pool(tf.ones([1, 3, 4, 1]), (4, 2), (2, 2), "valid")
