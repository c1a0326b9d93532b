"""Builds, saves and restores a model on a synthetic TPU; prints the results as JSON.

python construct.py '{"expert": 4}'     the mesh of one replica, on 8 cores
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
from gshard_tf.testing.tpu.synthetic_slice import SyntheticTPU
from gshard_tf.tpu.core_shards import Storage

RESULTS = {}
FOLDER = tempfile.mkdtemp()


def attempt(name, function):
    """Records the result of something that users do: True, or the error."""
    try:
        result = function()
        RESULTS[name] = True if result is None else result
    except Exception as error:  # the test asserts on it
        RESULTS[name] = f"{type(error).__name__}: {str(error)[-600:]}"


def path(name):
    return os.path.join(FOLDER, name)


def main(mesh):
    tpu = SyntheticTPU((2, 4, 1, 1))
    strategy = gshard_tf.tpu_strategy(tpu, mesh, topology=tpu.topology)
    RESULTS["is a TPUStrategy"] = isinstance(strategy, tf.distribute.TPUStrategy)
    RESULTS["replicas"] = strategy.num_replicas_in_sync
    RESULTS["cores"] = strategy.device_assignment.core_assignment.tolist()
    with strategy.scope():
        model = models.model()
        model.optimizer.build(model.trainable_variables)
    plain = models.model()
    plain.optimizer.build(plain.trainable_variables)

    variables = {v.path: v for v in model.variables + model.optimizer.variables}
    RESULTS["types"] = sorted({type(v.value).__name__ for v in variables.values()})
    if strategy.mesh.size > 1:
        RESULTS["rows"] = {
            row.path: [row.bytes, row.bytes_per_device, list(row.layout)]
            for row in strategy.describe(model).rows
        }
        RESULTS["bytes"] = {p: v.value.bytes_per_core for p, v in variables.items()}
        RESULTS["devices"] = [
            len({part.device for shards in v.value.values for part in shards._vars})
            for v in variables.values()
        ]
    attempt("start", lambda: models.difference(model.variables, plain.variables))

    # -- files ---------------------------------------------------------------------
    def changed():
        for weight in model.trainable_variables:
            weight.assign(weight + 1.0)

    def save_and_load(name, in_scope):
        with strategy.scope() if in_scope else tf.device(None):
            model.save_weights(path(name))
            want = model.get_weights()
            changed()
            model.load_weights(path(name))
        plain.load_weights(path(name))
        return models.difference(model.get_weights(), want) + models.difference(
            plain.get_weights(), want
        )

    attempt("h5", lambda: save_and_load("a.weights.h5", False))
    attempt("h5 in scope", lambda: save_and_load("b.weights.h5", True))

    def keras_file(name, in_scope):
        with strategy.scope() if in_scope else tf.device(None):
            model.save(path(name))
        custom = {"Table": models.Table}
        loaded = keras.saving.load_model(path(name), custom_objects=custom)
        return models.difference(loaded.get_weights(), model.get_weights())

    attempt("keras", lambda: keras_file("a.keras", False))
    attempt("keras in scope", lambda: keras_file("b.keras", True))

    def checkpoint(name, in_scope):
        with strategy.scope() if in_scope else tf.device(None):
            ours = tf.train.Checkpoint(model=model)
            assembled = Storage.assemble

            def refuse(*args):
                raise AssertionError("the whole of a weight was assembled")

            Storage.assemble = refuse
            try:
                saved = ours.save(path(name))
            finally:
                Storage.assemble = assembled
            want = model.get_weights() + [
                np.array(v) for v in model.optimizer.variables
            ]
            changed()
            Storage.assemble = refuse
            try:
                ours.restore(saved).assert_existing_objects_matched()
            finally:
                Storage.assemble = assembled
        tf.train.Checkpoint(model=plain).restore(saved).assert_consumed()
        got = model.get_weights() + [np.array(v) for v in model.optimizer.variables]
        theirs = plain.get_weights() + [np.array(v) for v in plain.optimizer.variables]
        return models.difference(got, want) + models.difference(theirs, want)

    attempt("checkpoint", lambda: checkpoint("c", False))
    attempt("checkpoint in scope", lambda: checkpoint("d", True))

    def from_plain():
        for weight in plain.trainable_variables:
            weight.assign(weight * 2.0)
        saved = tf.train.Checkpoint(model=plain).write(path("e"))
        tf.train.Checkpoint(model=model).read(saved)
        return models.difference(model.get_weights(), plain.get_weights())

    attempt("checkpoint of plain Keras", from_plain)

    def ours():
        """Checkpoints of gshard_tf: from the cores, into plain Keras, and back."""
        everything = gshard_tf.training_state(model), gshard_tf.training_state(plain)
        want = [np.array(v) for v in everything[0].values()]
        checkpoints = gshard_tf.CheckpointManager(path("ours"), asynchronous=False)
        assembled = Storage.assemble

        def refuse(*args):
            raise AssertionError("the whole of a weight was assembled")

        def without_assembling(function, *arguments):
            Storage.assemble = refuse
            try:
                function(*arguments)
            finally:
                Storage.assemble = assembled

        without_assembling(checkpoints.save, everything[0], 1)
        changed()
        without_assembling(checkpoints.restore, everything[0])
        checkpoints.restore(everything[1])
        RESULTS["ours: split"] = {
            name: array.split for name, array in checkpoints.manifest(1).arrays.items()
        }
        there = models.difference([np.array(v) for v in everything[0].values()], want)
        plainly = models.difference([np.array(v) for v in everything[1].values()], want)
        for weight in plain.trainable_variables:
            weight.assign(weight * 3.0)
        checkpoints.save(everything[1], 2)
        checkpoints.restore(everything[0])
        back = models.difference(model.get_weights(), plain.get_weights())
        return there + plainly + back

    attempt("ours", ours)

    def export(in_scope):
        name = path(f"export{in_scope}")
        ids, _ = models.data(8)
        with strategy.scope() if in_scope else tf.device(None):
            model.export(name, verbose=False)
        loaded = tf.saved_model.load(name)
        return models.difference([loaded.serve(ids)], [plain(ids)])

    if strategy.mesh.size > 1:  # with one core the variables are TensorFlow's
        attempt("export", lambda: export(False))
        attempt("export in scope", lambda: export(True))

    # -- values --------------------------------------------------------------------
    weight = model.trainable_variables[0]
    attempt("array", lambda: list(np.array(weight.value).shape))
    attempt("to numpy", lambda: list(keras.ops.convert_to_numpy(weight).shape))
    attempt(
        "rate", lambda: float(keras.ops.convert_to_numpy(model.optimizer.learning_rate))
    )

    def wrong_shape():
        weight.value.assign(np.zeros([3, 3], "float32"))

    attempt("wrong shape", wrong_shape)

    @tf.function(jit_compile=True)
    def compiled():
        return strategy.run(lambda: tf.constant(1.0))

    attempt("jit_compile", compiled)
    attempt("another's", lambda: strategy.layout(plain.trainable_variables[0]) and None)
    print(json.dumps(RESULTS))


main(json.loads(sys.argv[1]))
