"""Writes a model's variables in every way that there is, and looks at every core.

    python replicas.py '{"data": 2, "model": 2}'

The mesh of one replica, of 8 cores. A program is traced and none is run. Prints what it
found as JSON.
"""

import contextlib
import functools
import json
import os
import sys
import tempfile

import keras
import models
import numpy as np
import tensorflow as tf
from cores import Cores, parts
from traced import traced

import gshard_tf
from gshard_tf.testing.tpu.synthetic_slice import SyntheticTPU

FOLDER = tempfile.mkdtemp()
RANDOM = np.random.default_rng(1)


def path(name):
    return os.path.join(FOLDER, name)


def new_values(variables):
    """No two elements of a variable are equal, so that none can be elsewhere."""
    return [
        RANDOM.permutation(int(np.prod(v.shape))).reshape(v.shape).astype(v.dtype)
        for v in variables
    ]


def built():
    model = models.model()
    model.optimizer.build(model.trainable_variables)
    return model


def variables_of(model):
    return model.variables + model.optimizer.variables


def assign(variables, values):
    for variable, value in zip(variables, values, strict=True):
        variable.assign(value)


def after_writing(cores):
    """What is wrong after each way of giving variables a value."""
    variables = cores.variables
    old, new = new_values(variables), new_values(variables)
    wanted = {
        "assign": new,
        "assign_add": [a + b for a, b in zip(old, new, strict=True)],
        "assign_sub": [a - b for a, b in zip(old, new, strict=True)],
    }

    def call(method):
        for variable, value in zip(variables, new, strict=True):
            getattr(variable.value, method)(value)

    found = {}
    for method, scope, run in [
        (method, scope, run)
        for method in wanted
        for scope in (contextlib.nullcontext, cores.strategy.scope)
        for run in (lambda function: function, tf.function)
    ]:
        assign(variables, old)
        with scope():
            run(functools.partial(call, method))()
        where = "" if scope is contextlib.nullcontext else ", in the scope"
        how = ", in a function" if run is tf.function else ""
        found[method + where + how] = cores.wrong(wanted[method])
    return found


def after_scattering(cores):
    """What is wrong after each sparse update of a table; one row comes twice."""
    [table] = cores.variables
    start = RANDOM.normal(size=table.shape).astype("float32")
    values = RANDOM.normal(size=[3, table.shape[1]]).astype("float32")
    oracles = {
        "scatter_add": ([3, 1, 3], np.add.at),
        "scatter_sub": ([3, 1, 3], np.subtract.at),
        "scatter_update": ([3, 1, 20], np.ndarray.__setitem__),
    }
    found = {}
    for method, (rows, oracle) in oracles.items():
        wanted = start.copy()
        oracle(wanted, rows, values)
        for run in (lambda function: function, tf.function):
            table.assign(start)
            delta = tf.IndexedSlices(tf.constant(values), tf.constant(rows))
            run(functools.partial(getattr(table.value, method), delta))()
            how = ", in a function" if run is tf.function else ""
            found[method + how] = cores.wrong([wanted])
    return found


def after_reading(strategy, model, plain):
    """What is wrong after reading each kind of file, of ours and of plain Keras.

    What is right is what a plain model holds that has read the same file: not all of
    them keep the state of seed generators.
    """
    checkpoints = gshard_tf.CheckpointManager(path("ours"), asynchronous=False)
    kinds = {
        "tf.train.Checkpoint": (
            lambda m, name: tf.train.Checkpoint(model=m).write(path(name)),
            lambda m, name: tf.train.Checkpoint(model=m).read(path(name)),
        ),
        "CheckpointManager": (
            lambda m, name: checkpoints.save(gshard_tf.training_state(m), len(name)),
            lambda m, name: checkpoints.restore(gshard_tf.training_state(m), len(name)),
        ),
        ".weights.h5": (
            lambda m, name: m.save_weights(path(f"{name}.weights.h5")),
            lambda m, name: m.load_weights(path(f"{name}.weights.h5")),
        ),
    }
    found = {}
    cores = Cores(strategy, variables_of(model))
    reader = built()
    for kind, (write, read) in kinds.items():
        for name, source in [("ours", model), ("plain", plain)]:
            written = new_values(variables_of(source))
            assign(variables_of(source), written)
            write(source, name)
            cores.spoil()
            assign(variables_of(reader), [np.full(v.shape, 77) for v in written])
            read(model, name)
            read(reader, name)
            wanted = [np.array(v) for v in variables_of(reader)]
            found[f"{kind}, {name}"] = cores.wrong(wanted) + [
                f"{variable.path} is not as it was written"
                for variable, want, was in zip(
                    cores.variables, wanted, written, strict=True
                )
                if "seed" not in variable.path and not np.array_equal(want, was)
            ]
    model.save(path("a.keras"))
    custom = {"Table": models.Table}
    reader = keras.saving.load_model(path("a.keras"), custom_objects=custom)
    with strategy.scope():
        loaded = keras.saving.load_model(path("a.keras"), custom_objects=custom)
    cores = Cores(strategy, variables_of(loaded))
    found[".keras, in the scope"] = cores.wrong(
        [np.array(v) for v in variables_of(reader)]
    )
    return found


def metrics(strategy):
    """What each core holds of a metric's sum: each replica has its own."""
    with strategy.scope():
        total, _ = keras.metrics.Mean().variables
    found = {}

    def note(name):
        held = [[None] * strategy.mesh.size for _ in total.value.values]
        for replica, core, part in parts(total):
            held[replica][core] = float(part.numpy())
        found[name] = [held, float(np.array(total.value))]

    note("first value")
    total.assign(6.0)
    note("assign")
    tf.train.Checkpoint(total=total).write(path("total"))
    total.assign(0.0)
    note("zero")
    tf.train.Checkpoint(total=total).read(path("total"))
    note("restored")
    return found


def main(mesh):
    strategy = gshard_tf.tpu_strategy(SyntheticTPU((2, 4, 1, 1)), mesh)
    with strategy.scope():
        model = built()
    plain = built()
    everything = Cores(strategy, variables_of(model))
    theirs = [np.array(v) for v in variables_of(plain)]
    wrong = {"first values": everything.wrong(theirs)}
    wrong |= after_writing(everything)
    wrong |= after_scattering(Cores(strategy, [model.get_layer("embedding").table]))
    wrong |= after_reading(strategy, model, plain)
    found = {
        "layouts": {
            v.path: list(strategy.layout(v).sharding_specs) for v in model.variables
        },
        "wrong": wrong,
        "metrics": metrics(strategy),
        **traced(strategy, model),
    }
    print(json.dumps(found))


main(json.loads(sys.argv[1]))
