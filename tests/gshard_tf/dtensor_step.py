"""A training step written by hand on a DTensor mesh, and the same on one device.

    python dtensor_step.py sgd          or adam

Operation by operation, as DTensor runs outside of `tf.function`; prints, as JSON, the
largest differences of losses and weights after some steps, and where weights lie.
"""

import json
import sys

import keras
import numpy as np
import tensorflow as tf
from tensorflow.experimental import dtensor

import gshard_tf
from keras_layers import MoELayer

DEVICES, STEPS, RATE = 4, 3, 0.05
GROUPS, TOKENS, WIDTH, HIDDEN = 4, 8, 6, 10


def layer():
    made = MoELayer(DEVICES, HIDDEN, seed=0, name="moe")
    keras.utils.set_random_seed(1)
    made.build((GROUPS, TOKENS, WIDTH))
    return made


def data():
    rng = np.random.default_rng(0)
    shape = [GROUPS, TOKENS, WIDTH]
    return [rng.normal(size=shape).astype("float32") for _ in range(2)]


class Sgd:
    def __init__(self, weights, place):
        self.weights = weights

    def apply(self, gradients):
        for weight, gradient in zip(self.weights, gradients, strict=True):
            weight.assign_sub(RATE * gradient)


class Adam:
    """As in its paper (arXiv 1412.6980, Algorithm 1)."""

    def __init__(self, weights, place):
        self.weights, self.step = weights, 0
        self.slots = [
            [place(np.zeros(w.shape, "float32"), w) for _ in range(2)] for w in weights
        ]

    def apply(self, gradients):
        self.step += 1
        first, second = 1 - 0.9**self.step, 1 - 0.999**self.step
        for weight, slots, g in zip(self.weights, self.slots, gradients, strict=True):
            mean, square = slots
            mean.assign(0.9 * mean.read_value() + 0.1 * g)
            square.assign(0.999 * square.read_value() + 0.001 * g * g)
            scale = tf.sqrt(square.read_value() / second) + 1e-7
            weight.assign_sub(RATE * (mean.read_value() / first) / scale)


def train(optimizer, put, place):
    """Losses, and the weights, of a few steps."""
    moe = layer()
    weights = [place(v.numpy(), v.path) for v in moe.trainable_variables]
    fixed = [put(v.numpy(), None) for v in moe.non_trainable_variables]
    x, y = (put(array, "batch") for array in data())
    rule = {"sgd": Sgd, "adam": Adam}[optimizer](
        weights, lambda array, like: place(array, like)
    )
    losses = []
    for _ in range(STEPS):
        with tf.GradientTape() as tape:
            values = [weight.read_value() for weight in weights]
            output, _ = moe.stateless_call(values, fixed, x, training=True)
            loss = tf.reduce_mean(tf.square(output - y))
        gradients = tape.gradient(loss, weights)
        rule.apply(gradients)
        losses.append(loss)
    return losses, weights


def main(optimizer):
    plain_losses, plain_weights = train(
        optimizer,
        lambda array, _: tf.constant(array),
        lambda array, _: tf.Variable(array),
    )
    tf_devices = [f"CPU:{i}" for i in range(DEVICES)]
    mesh = dtensor.create_mesh([("expert", DEVICES)], devices=tf_devices)
    rules = gshard_tf.AxisRules({"group": "expert", "expert": "expert"})

    def layout_of(what, rank):
        specs = [dtensor.UNSHARDED] * rank
        if what == "batch" or (isinstance(what, str) and "experts/" in what):
            specs[0] = "expert"
        return dtensor.Layout(specs, mesh)

    def put(array, what):
        whole = dtensor.copy_to_mesh(
            array, dtensor.Layout.replicated(mesh, np.ndim(array))
        )
        return dtensor.relayout(whole, layout_of(what, np.ndim(array)))

    def place(array, what):
        if isinstance(what, dtensor.DVariable):
            whole = dtensor.copy_to_mesh(
                array, dtensor.Layout.replicated(mesh, np.ndim(array))
            )
            return dtensor.DVariable(dtensor.relayout(whole, what.layout))
        return dtensor.DVariable(put(array, what))

    with gshard_tf.use_mesh(mesh, rules):
        losses, weights = train(optimizer, put, place)

    def whole(tensor):
        replicated = dtensor.Layout.replicated(mesh, tensor.shape.rank)
        return dtensor.relayout(tensor, replicated).numpy()

    print(
        json.dumps(
            {
                "losses": [float(whole(x)) for x in losses],
                "plain": [float(x) for x in plain_losses],
                "weights": max(
                    float(np.max(np.abs(whole(a.read_value()) - b.numpy())))
                    for a, b in zip(weights, plain_weights, strict=True)
                ),
                "layouts": [w.layout.sharding_specs for w in weights],
            }
        )
    )


tf.config.set_logical_device_configuration(
    tf.config.list_physical_devices("CPU")[0],
    [tf.config.LogicalDeviceConfiguration()] * DEVICES,
)
main(sys.argv[1])
