"""Small programs that XLA's partitioner gets wrong, where nothing mends them."""

import numpy as np
import tensorflow as tf

import gshard_tf


def values(*shape, seed=0):
    """Distinct numbers: a maximum has no ties."""
    size = int(np.prod(shape))
    numbers = np.random.default_rng(seed).permutation(size)
    return tf.constant((numbers / size - 0.4).reshape(shape).astype("float32"))


def with_gradients(operation):
    """`operation(*x)`, and the gradients of a loss of it, as a step of a mesh."""

    def step(*x):
        floats = [value for value in x if value.dtype.is_floating]
        with tf.GradientTape() as tape:
            tape.watch(floats)
            y = operation(*x)
            loss = tf.reduce_sum(tf.sin(3.0 * y))
        return y, *(tf.convert_to_tensor(g) for g in tape.gradient(loss, floats))

    return step


def on(*axes):
    return lambda x: gshard_tf.annotate(x, axes)


batch, height = on("batch", None, None, None), on(None, "height", None, None)


def as_it_is(x):
    return x


# `keep`: what is done with all that enters and leaves the operation.


def depthwise(x, w, keep=as_it_is):
    return keep(tf.nn.depthwise_conv2d(keep(batch(x)), w, [1, 1, 1, 1], "SAME"))


def grouped(x, w, keep=as_it_is):
    return keep(tf.nn.conv2d(keep(batch(x)), w, 1, "SAME"))


def strided(x, w, keep=as_it_is):
    return height(keep(tf.nn.conv2d(keep(height(x)), w, 3, "SAME")))


def spread(x, w, keep=as_it_is):
    return keep(tf.nn.conv2d(keep(height(x)), w, 1, "SAME"))


def pooled(x, keep=as_it_is):
    return keep(tf.nn.max_pool2d(keep(height(x)), 3, 1, "SAME"))


def segments(x, ids, keep=as_it_is):
    rows = on("rows", None)(on("rows", None)(x) + 1.0)
    return keep(tf.math.unsorted_segment_sum(keep(rows), keep(ids), 16))


def looked_up(x, ids, keep=as_it_is):
    return on("rows", None)(keep(tf.gather(keep(x), keep(ids))))


TWO_BY_THREE = {"data": 2, "model": 3}, {"batch": "data"}
SPATIAL = {"rows": 8}, {"height": "rows"}
ROWS = {"data": 8}, {"rows": "data"}
IDS = np.arange(1, 13, dtype="int32") * 5 % 16
FAULTS = {
    "depthwise kernel": (depthwise, *TWO_BY_THREE, (6, 8, 8, 4), (3, 3, 4, 2)),
    "grouped kernel": (grouped, *TWO_BY_THREE, (6, 8, 8, 4), (3, 3, 2, 6)),
    "strided kernel": (strided, *SPATIAL, (2, 32, 12, 4), (3, 3, 4, 6)),
    "image on two axes": (
        spread,
        {"data": 2, "rows": 3},
        {"height": "data"},
        (8, 16, 6, 1),
        (2, 3, 1, 2),
    ),
    "overlapping maxima": (pooled, *SPATIAL, (2, 16, 8, 3)),
    "sums": (segments, *ROWS, (12, 4), IDS),
    "looked-up rows": (looked_up, *ROWS, (16, 8), IDS),
}


def arguments(given):
    return [
        values(*x, seed=i) if isinstance(x, tuple) else tf.constant(x)
        for i, x in enumerate(given)
    ]
