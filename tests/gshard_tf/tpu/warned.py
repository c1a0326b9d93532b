"""Traces training steps on a synthetic TPU; prints the warnings as JSON.

python warned.py '{"data": 2, "model": 2}'     the mesh of one replica, on 8 cores
"""

import json
import sys
import warnings

import keras
import models
import tensorflow as tf

import gshard_tf
from gshard_tf.testing.tpu.synthetic_slice import SyntheticTPU


def convolutions():
    layers = keras.layers
    model = keras.Sequential(
        [
            layers.Input((16, 16, 3)),
            layers.Conv2D(8, 3, name="plain"),
            layers.DepthwiseConv2D(3, name="depth"),
            layers.MaxPooling2D(3, strides=2, name="pool"),
            layers.GlobalAveragePooling2D(),
            layers.Dense(1),
        ]
    )
    model = keras.Model(model.inputs, model.outputs)
    model.compile("sgd", "mse")
    return model


def warned(strategy, model, *specs):
    """The warnings of tracing a step of a model."""
    with strategy.scope():
        model.optimizer.build(model.trainable_variables)

    @tf.function(autograph=False)
    def step(x, y):
        def train(x, y):
            with tf.GradientTape() as tape:
                loss = tf.reduce_mean((model(x, training=True) - y) ** 2)
            weights = model.trainable_variables
            model.optimizer.apply(tape.gradient(loss, [w.value for w in weights]))
            return loss

        return strategy.run(train, args=(x, y))

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        step.get_concrete_function(*specs)
    messages = [str(each.message) for each in caught]
    return [message for message in messages if "partitioner" in message]


def region_refused(strategy):
    """The error of a layer with a manual region, or None."""
    axes = ("batch", None, None)

    class Absolute(keras.layers.Layer):
        def call(self, x):
            return gshard_tf.manual(abs, [axes], axes)(x)

    try:
        with strategy.scope():
            Absolute()(keras.Input((8, 4)))
    except ValueError as error:
        return str(error)


def main(mesh):
    tpu = SyntheticTPU((2, 4, 1, 1))
    strategy = gshard_tf.tpu_strategy(tpu, mesh, topology=tpu.topology)
    alone = gshard_tf.tpu_strategy(tpu, {"data": 1}, topology=tpu.topology)
    images = tf.TensorSpec([4, 16, 16, 3]), tf.TensorSpec([4, 1])
    ids = tf.TensorSpec([8, 8], tf.int32), tf.TensorSpec([8, 8, 2])
    with strategy.scope():
        model, experts = convolutions(), models.model("sparse")
    with alone.scope():
        single = convolutions()
    results = {
        "convolutions": warned(strategy, model, *images),
        "again": warned(strategy, model, *images),
        "experts": warned(strategy, experts, *ids),
        "manual": region_refused(strategy),
        "manual, one core": region_refused(alone),
        "one core": warned(alone, single, *images),
    }
    print(json.dumps(results))


main(json.loads(sys.argv[1]))
