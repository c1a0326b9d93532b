"""Two steps of a tiny model on several replicas of several cores, and in plain Keras.

    python tiny_step.py '{"data": 2, "model": 2}'

The mesh of one replica, of 8 cores. `fit.py` does the same with all that `fit` has, and
takes minutes. Prints the results as JSON.
"""

import json
import sys

import keras
import models
import numpy as np
import tensorflow as tf
from cores import Cores

import gshard_tf

gshard_tf.request_cpu_devices(8)

from gshard_tf.testing.tpu.simulated_fit import SimulatedStep  # noqa: E402
from gshard_tf.testing.tpu.synthetic_slice import SyntheticTPU  # noqa: E402

BATCH, STEPS = 16, 2


def tiny():
    keras.utils.set_random_seed(3)
    model = keras.Sequential(
        [
            keras.layers.Input((models.LENGTH,), dtype="int32"),
            models.Table(name="embedding"),
            keras.layers.Dense(2),
        ]
    )
    model.optimizer = keras.optimizers.SGD(0.5, momentum=0.9)
    model.optimizer.build(model.trainable_variables)
    return model


def train(model, ids, y, replicas):
    """One step on a replica's part of a batch; its share of the loss."""
    with tf.GradientTape() as tape:
        loss = tf.reduce_mean((model(ids) - y) ** 2) / replicas
    weights = model.trainable_variables
    model.optimizer.apply(tape.gradient(loss, [w.value for w in weights]), weights)
    return loss


def main(mesh):
    tpu = SyntheticTPU((2, 4, 1, 1))
    strategy = gshard_tf.tpu_strategy(tpu, mesh, topology=tpu.topology)
    replicas = strategy.num_replicas_in_sync
    with strategy.scope():
        model = tiny()
    plain = tiny()
    cores = Cores(strategy, model.variables + model.optimizer.variables)
    theirs = plain.variables + plain.optimizer.variables
    start = model.get_weights()

    def step(batch):
        loss = train(model, *batch, replicas)
        context = tf.distribute.get_replica_context()
        number = tf.cast(context.replica_id_in_sync_group, tf.float32)
        return context.all_reduce("sum", [loss, number + 1.0])

    data = tf.data.Dataset.from_tensor_slices(models.data(BATCH * STEPS))
    batches = data.batch(BATCH, drop_remainder=True)
    simulated = None
    losses, plain_losses, numbers = [], [], []
    for batch in strategy.experimental_distribute_dataset(batches):
        if simulated is None:
            values = [v.value for v in cores.variables]
            simulated = SimulatedStep(strategy, step, batch, values)
        loss, number = simulated(batch)
        losses.append(float(loss))
        numbers.append(float(number))
    for ids, y in batches:
        plain_losses.append(float(train(plain, ids, y, 1)))
    results = {
        "losses": [losses, plain_losses],
        "numbers": numbers,
        "size": [simulated.module.replicas, simulated.module.cores],
        "moved": models.difference(start, model.get_weights()),
        "difference": models.difference([v.value for v in cores.variables], theirs),
        "wrong": cores.wrong([np.array(v.value) for v in cores.variables]),
        "layout": list(
            strategy.layout(model.get_layer("embedding").table).sharding_specs
        ),
    }
    print(json.dumps(results))


main(json.loads(sys.argv[1]))
