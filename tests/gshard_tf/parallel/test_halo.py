"""Windows over split images: values and gradients of TensorFlow on one device."""

import numpy as np
import parity
import pytest
import tensorflow as tf

import gshard_tf
from gshard_tf import halo_convolution, halo_max_pool

S, C = 32, 3
RULES = gshard_tf.AxisRules({"height": "y", "width": "x"})


def _gradients(fn, x, kernel):
    with tf.GradientTape() as tape:
        tape.watch([x, kernel])
        y = fn(x, kernel)
        loss = tf.reduce_sum(tf.sin(y))
    gradients = tape.gradient(loss, [x, kernel], unconnected_gradients="zero")
    return y, *gradients


def _conv(size, stride, dilation):
    return (
        lambda x, w: halo_convolution(x, w, (stride,) * 2, (dilation,) * 2),
        lambda x, w: tf.nn.conv2d(x, w, stride, "SAME", dilations=dilation),
        size,
    )


CASES = {
    "stride 2": _conv(3, 2, 1),
    "5x5, dilation 2": _conv(5, 1, 2),
    "1x1, stride 2": _conv(1, 2, 1),
    "pooling": (
        lambda x, w: halo_max_pool(x, (3, 3), (2, 2)),
        lambda x, w: tf.nn.max_pool2d(x, 3, 2, "SAME"),
        1,
    ),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_equals_tensorflow_and_sends_halos_only(case):
    ours, plain, size = case
    rng = np.random.default_rng(0)
    x = tf.constant(rng.normal(size=[2, S, S, C]), tf.float32)
    kernel = tf.constant(rng.normal(size=[size, size, C, 4]), tf.float32)
    strategy = parity.strategy_of({"y": 4, "x": 2}, rules=RULES)

    @tf.function
    def step(x, kernel):
        x = gshard_tf.annotate(x, ("batch", "height", "width", None))
        return _gradients(ours, x, kernel)

    found = strategy.run(step, args=(x, kernel))
    for a, b in zip(found, _gradients(plain, x, kernel), strict=True):
        assert parity.relative_difference(a, b) < 1e-5
    # (Results go to the host; the rest is no image.)
    for each in strategy.programs[-1].collectives():
        if "shard_map/" in each.op_name and each.kind != "all-gather":
            assert each.bytes <= 4 * 2 * S * C * 4, each


def test_a_part_must_divide_by_the_stride():
    with pytest.raises(ValueError, match="must divide by the stride"):
        halo_convolution(tf.ones([1, 3, 4, 1]), tf.ones([3, 3, 1, 1]), (2, 2))
