"""Fits a model on a synthetic TPU, step by step on CPU devices, and in plain Keras.

    python fit.py '{"expert": 8}' adam 0.1 1

The mesh of one replica, optimizer, dropout, steps per execution. Prints the results
as JSON.
"""

import json
import os
import sys
import tempfile

import keras
import models
import numpy as np
import tensorflow as tf

import gshard_tf

gshard_tf.request_cpu_devices(8)

from gshard_tf.hlo.collectives import collectives  # noqa: E402
from gshard_tf.testing.tpu.simulated_fit import simulate_fit  # noqa: E402
from gshard_tf.testing.tpu.synthetic_slice import SyntheticTPU  # noqa: E402

EPOCHS = 3
BATCH = 16
# Keras's Adam takes duplicate rows of a sparse gradient one by one, and TPUStrategy
# makes it dense: what plain Keras does with the same gradient as a dense one.
AS_PLAIN = {"sparse adam": "adam"}


def callbacks(folder):
    """Those that read or write variables, and some that do not."""
    kinds = keras.callbacks
    return [
        kinds.LearningRateScheduler(lambda epoch, rate: rate * 0.9),
        kinds.ReduceLROnPlateau(monitor="loss", patience=0, min_delta=10.0),
        kinds.ModelCheckpoint(os.path.join(folder, "{epoch}.keras")),
        kinds.ModelCheckpoint(
            os.path.join(folder, "{epoch}.weights.h5"), save_weights_only=True
        ),
        kinds.BackupAndRestore(os.path.join(folder, "backup")),
        kinds.TensorBoard(os.path.join(folder, "logs"), histogram_freq=1),
        kinds.CSVLogger(os.path.join(folder, "log.csv")),
        kinds.TerminateOnNaN(),
        kinds.EarlyStopping(monitor="loss", patience=EPOCHS, restore_best_weights=True),
    ]


def train(model, dataset, steps):
    folder = tempfile.mkdtemp()
    executions = []
    count = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda batch, logs: executions.append(batch)
    )
    history = model.fit(
        dataset,
        epochs=EPOCHS,
        steps_per_epoch=steps,
        verbose=0,
        shuffle=False,
        callbacks=[*callbacks(folder), count],
    )
    return history.history, sorted(os.listdir(folder)), executions


def main(mesh, optimizer, dropout, per_execution):
    tpu = SyntheticTPU((2, 4, 1, 1))
    strategy = gshard_tf.tpu_strategy(tpu, mesh, topology=tpu.topology)
    per_epoch = 2 * per_execution
    data = models.data(BATCH * per_epoch)
    dataset = tf.data.Dataset.from_tensor_slices(data).batch(BATCH, drop_remainder=True)
    if per_execution > 1:
        # Else TensorFlow allows for a batch of no examples, and shapes are not static.
        dataset = dataset.repeat()
    with strategy.scope():
        model = models.model(optimizer, dropout, per_execution)
    start = model.get_weights()
    steps = simulate_fit(model)
    ours, files, executions = train(model, dataset, per_epoch)
    plain = models.model(AS_PLAIN.get(optimizer, optimizer), dropout, per_execution)
    plain.jit_compile = False
    theirs, their_files, their_executions = train(plain, dataset, per_epoch)

    [step] = steps
    module = step.module
    communication = collectives(step.program.as_text())
    variables = model.variables + model.optimizer.variables
    print(
        json.dumps(
            {
                "logs": {
                    name: float(np.max(np.abs(np.array(ours[name]) - theirs[name])))
                    for name in theirs
                },
                "names": sorted(ours),
                "weights": models.difference(model.variables, plain.variables),
                "slots": models.difference(
                    model.optimizer.variables, plain.optimizer.variables
                ),
                "moved": models.difference(start, model.get_weights()),
                "files": files,
                "their files": their_files,
                "executions": executions,
                "their executions": their_executions,
                "iterations": int(np.array(model.optimizer.iterations)),
                "shares": {
                    v.path: v.value.bytes_per_core
                    / max(1, int(np.prod(v.shape)) * v.value.dtype.size)
                    for v in variables
                },
                "use_spmd": module.use_spmd,
                "size": [module.replicas, module.cores],
                "host": module.host_operations,
                "inputs": [
                    list(a.sharding) for a in module.arguments if not a.is_variable
                ],
                "split arguments": sum(
                    bool(a.sharding) for a in module.arguments if a.is_variable
                ),
                "split updates": sum(
                    bool(module.result_shardings[result])
                    for _, result in module.updates
                ),
                "collectives": [
                    [c.kind, [list(dims) for _, dims in c.shapes]]
                    for c in communication
                ],
            }
        )
    )


main(json.loads(sys.argv[1]), sys.argv[2], float(sys.argv[3]), int(sys.argv[4]))
