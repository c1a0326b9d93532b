"""Fits a model on a synthetic TPU, step by step on CPU devices, and in plain Keras.

    python fit.py '{"expert": 8}' adam 0.1      mesh of one replica, optimizer, dropout

Prints what it found as JSON.
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

from gshard_tf import hlo_text, inspection  # noqa: E402
from gshard_tf.tpu.simulation import simulate_fit  # noqa: E402
from gshard_tf.tpu.synthetic import SyntheticTPU  # noqa: E402

EPOCHS = 3


def callbacks(folder):
    """Those that read or write variables, and some that do not."""
    made = keras.callbacks
    return [
        made.LearningRateScheduler(lambda epoch, rate: rate * 0.9),
        made.ReduceLROnPlateau(monitor="loss", patience=0, min_delta=10.0),
        made.ModelCheckpoint(os.path.join(folder, "{epoch}.keras")),
        made.ModelCheckpoint(
            os.path.join(folder, "{epoch}.weights.h5"), save_weights_only=True
        ),
        made.BackupAndRestore(os.path.join(folder, "backup")),
        made.TensorBoard(os.path.join(folder, "logs"), histogram_freq=1),
        made.CSVLogger(os.path.join(folder, "log.csv")),
        made.TerminateOnNaN(),
        made.EarlyStopping(monitor="loss", patience=EPOCHS, restore_best_weights=True),
    ]


def train(model, dataset):
    folder = tempfile.mkdtemp()
    history = model.fit(
        dataset, epochs=EPOCHS, verbose=0, shuffle=False, callbacks=callbacks(folder)
    )
    return history.history, sorted(os.listdir(folder))


def main(mesh, optimizer, dropout):
    strategy = gshard_tf.tpu_strategy(SyntheticTPU((2, 4, 1, 1)), mesh)
    dataset = tf.data.Dataset.from_tensor_slices(models.data()).batch(
        16, drop_remainder=True
    )
    with strategy.scope():
        model = models.model(optimizer, dropout)
    start = model.get_weights()
    steps = simulate_fit(model)
    ours, files = train(model, dataset)
    plain = models.model(optimizer, dropout)
    plain.jit_compile = False
    theirs, their_files = train(plain, dataset)

    [step] = steps
    module = step.module
    collectives = inspection.collectives_of(hlo_text.parse(step.program.as_text()))
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
                    [c.kind, [list(dims) for _, dims in c.shapes]] for c in collectives
                ],
            }
        )
    )


main(json.loads(sys.argv[1]), sys.argv[2], float(sys.argv[3]))
