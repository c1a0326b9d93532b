"""A training step of an `MoELayer` by hand, on a DTensor mesh and on one device.

    python dtensor_step.py eager sgd adam

How it runs: "eager", "function" (in a `tf.function`), or "replicated" (the same, with
slots that do not lie as their weights do); and optimizers. Prints, as JSON, for each
optimizer the largest difference of losses and weights after some steps, and where the
weights lie.
"""

import contextlib
import json
import sys

import keras
import numpy as np
import tensorflow as tf
from tensorflow.experimental import dtensor

import gshard_tf
from keras_layers import MoELayer

DEVICES, STEPS, RATE = 4, 3, 0.05
SHAPE, HIDDEN = (4, 8, 6), 10  # [G, S, M]


def sgd(weight, slots, gradient, step):
    weight.assign_sub(RATE * gradient)


def adam(weight, slots, gradient, step):
    """Algorithm 1 of arXiv 1412.6980."""
    mean, square = slots
    mean.assign(0.9 * mean + 0.1 * gradient)
    square.assign(0.999 * square + 0.001 * gradient * gradient)
    scale = tf.sqrt(square / (1 - 0.999**step)) + 1e-7
    weight.assign_sub(RATE * (mean / (1 - 0.9**step)) / scale)


def adafactor(weight, slots, gradient, step):
    """Algorithm 4 of arXiv 1804.04235, without relative step sizes."""
    rows, columns = slots
    square = tf.square(gradient) + 1e-30
    decay = 1 - step**-0.8
    rows.assign(decay * rows + (1 - decay) * tf.reduce_mean(square, -1))
    columns.assign(decay * columns + (1 - decay) * tf.reduce_mean(square, -2))
    share = rows / tf.reduce_mean(rows, -1, keepdims=True)
    update = gradient / tf.sqrt(share)[..., None] / tf.sqrt(columns)[..., None, :]
    size = tf.sqrt(tf.reduce_mean(tf.square(update)))
    weight.assign_sub(RATE * update / tf.maximum(1.0, size))


RULES = {"sgd": sgd, "adam": adam, "adafactor": adafactor}
SLOTS = {
    "sgd": lambda shape: [],
    "adam": lambda shape: [shape, shape],
    "adafactor": lambda shape: [shape[:-1], shape[:-2] + shape[-1:]],
}


def train(moe, optimizer, put, variable, compiled, split_slots=True):
    """Losses and weights. `put(array, split)` gives a tensor, perhaps on a mesh."""
    rng = np.random.default_rng(0)
    x, y = (put(rng.normal(size=SHAPE).astype("float32"), True) for _ in range(2))
    weights, slots = [], []
    for weight in moe.trainable_variables:
        split = "experts/" in weight.path
        weights.append(variable(put(weight.numpy(), split)))
        shapes = SLOTS[optimizer](list(weight.shape))
        slots.append(
            [
                variable(put(np.zeros(shape, "float32"), split and split_slots))
                for shape in shapes
            ]
        )
    fixed = [put(v.numpy(), False) for v in moe.non_trainable_variables]

    def step(x, y, number, *fixed):
        with tf.GradientTape() as tape:
            values = [weight.read_value() for weight in weights]
            tape.watch(values)
            output, _ = moe.stateless_call(values, list(fixed), x, training=True)
            loss = tf.reduce_mean(tf.square(output - y))
        gradients = tape.gradient(loss, values)
        for each in zip(weights, slots, gradients, strict=True):
            RULES[optimizer](*each, number)
        return loss

    step = tf.function(step, autograph=False) if compiled else step
    losses = [
        step(x, y, put(np.float32(number), False), *fixed)
        for number in range(1, STEPS + 1)
    ]
    return losses, weights


def main(how, optimizers):
    tf.config.set_logical_device_configuration(
        tf.config.list_physical_devices("CPU")[0],
        [tf.config.LogicalDeviceConfiguration()] * DEVICES,
    )
    mesh = dtensor.create_mesh(
        [("expert", DEVICES)], devices=[f"CPU:{i}" for i in range(DEVICES)]
    )
    rules = gshard_tf.AxisRules({"group": "expert", "expert": "expert"})

    def put(array, split):
        layout = dtensor.Layout.replicated(mesh, np.ndim(array))
        placed = dtensor.copy_to_mesh(array, layout)
        if not split:
            return placed
        specs = ["expert"] + [dtensor.UNSHARDED] * (np.ndim(array) - 1)
        return dtensor.relayout(placed, dtensor.Layout(specs, mesh))

    def whole(tensor):
        layout = dtensor.Layout.replicated(mesh, tensor.shape.rank)
        return dtensor.relayout(tensor, layout).numpy()

    # (The gathers of the other dispatcher have no layout rules that work.)
    keras.utils.set_random_seed(1)
    moe = MoELayer(DEVICES, HIDDEN, dispatcher="einsum", seed=0, name="moe")
    moe.build(SHAPE)
    found = {}
    for optimizer in optimizers:
        losses, weights = train(
            moe, optimizer, lambda array, _: tf.constant(array), tf.Variable, False
        )
        with contextlib.ExitStack() as on_mesh:
            if how == "eager":
                # What the layer makes itself, a range say, is then made on the mesh;
                # and its annotations are `relayout`. In a function they are nothing.
                on_mesh.enter_context(gshard_tf.use_mesh(mesh, rules))
                on_mesh.enter_context(dtensor.default_mesh(mesh))
            ours, our_weights = train(
                moe,
                optimizer,
                put,
                dtensor.DVariable,
                how != "eager",
                how != "replicated",
            )
        pairs = zip(our_weights, weights, strict=True)
        found[optimizer] = {
            "losses": max(
                float(abs(whole(a) - b)) for a, b in zip(ours, losses, strict=True)
            ),
            "weights": max(float(np.max(np.abs(whole(a) - b))) for a, b in pairs),
            "moved": max(
                float(np.max(np.abs(a.numpy() - b.numpy())))
                for a, b in zip(weights, moe.trainable_variables, strict=True)
            ),
            "layouts": [w.layout.sharding_specs for w in our_weights],
        }
    print(json.dumps(found))


main(sys.argv[1], sys.argv[2:])
