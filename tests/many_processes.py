"""A process of a run: `many_processes.py DEVICES PATIENCE FOLDER [key=value ...]`.

What may be given: `rows=own`, `seeds=differ`, `mesh=data|expert|both|turned`,
`weights=whole` (a model that no mesh splits), `copies=none` (no host copies, and first
values shard by shard), `position=iterator`, `epochs=`, and
`do=`, what process 1 (or those of `who=0,1`) does after step `step=`: `raise`, `hang`,
`die`, `stop`, `exit`, or `term`, a SIGTERM.
"""

import json
import os
import pathlib
import signal
import sys
import time
from unittest import mock

from xla_flags import QUICK_TO_COMPILE, use_older_emitter

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("XLA_FLAGS", QUICK_TO_COMPILE)

import keras
import numpy as np
import parity
import tensorflow as tf

import gshard_tf
from gshard_tf.sharding import initial_value
from gshard_tf.spmd.program import SpmdProgram

use_older_emitter()

STEPS_PER_EPOCH, EPOCHS, BATCH = 4, 2, 16


class Note(keras.callbacks.Callback):
    """Notes losses and the rows that were fed, and does what is to go wrong."""

    def __init__(self, saver, index, folder, given):
        super().__init__()
        self.saver = saver
        self.path = folder / f"losses-{index}.txt"
        mine = str(index) in given.get("who", "1").split(",")
        self.goes_wrong = mine and given.get("do")
        self.step = int(given.get("step", 0))
        self.rows = None

    def on_train_begin(self, logs=None):
        put = SpmdProgram.put_inputs

        def noted(program, arrays):
            # A number of each example, which no other one has.
            self.rows = arrays[0][:, 0, 0].tolist()
            return put(program, arrays)

        self.patch = mock.patch.object(SpmdProgram, "put_inputs", noted)
        self.patch.start()

    def on_train_end(self, logs=None):
        self.patch.stop()

    def on_train_batch_end(self, batch, logs=None):
        with open(self.path, "a") as file:
            row = {"step": self.saver.step, "loss": float(logs["loss"])}
            file.write(json.dumps(row | {"rows": self.rows}) + "\n")
        if self.saver.step == self.step:
            if self.goes_wrong == "raise":
                raise RuntimeError("the disk of this host is on fire")
            if self.goes_wrong == "hang":
                time.sleep(1000)
            if self.goes_wrong == "die":
                os.kill(os.getpid(), 9)
            if self.goes_wrong == "stop":
                os.kill(os.getpid(), signal.SIGSTOP)
            if self.goes_wrong == "exit":
                sys.exit(0)
            if self.goes_wrong == "term":
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(0.5)  # the thread that listens hears of it


def classifier(given):
    """A model with experts, whose weights are split; or one whose are not."""
    if given.get("weights") != "whole":
        return parity.classifier(dropout=0.3)
    layers = keras.layers
    return keras.Sequential(
        [layers.Input([8, 4]), layers.Flatten(), layers.Dense(8), layers.Dense(3)]
    )


def mesh_of(devices, kind):
    """All devices along one axis, or half of them along each of two."""
    if kind == "both":
        return gshard_tf.create_mesh({"data": devices // 2, "expert": 2})
    if kind == "turned":  # examples are split within a process
        return gshard_tf.create_mesh({"expert": 2, "data": devices // 2})
    return gshard_tf.create_mesh({kind: devices})


def train(index, devices, folder, given):
    """Trains on a mesh of `devices` in all; returns the model."""
    keras.utils.set_random_seed(7 + index * ("seeds" in given))
    own = given.get("rows") == "own"
    x, y = parity.data(48)
    dataset = tf.data.Dataset.from_tensor_slices((x, y)).shuffle(20, seed=3).repeat()
    dataset = dataset.batch(BATCH, drop_remainder=True)
    if own:
        dataset = dataset.map(lambda *batch: gshard_tf.process_local_rows(batch))
    position = given.get("position", "count")
    data = gshard_tf.ResumableDataset(dataset, position=position)
    mesh = mesh_of(devices, given.get("mesh", "expert"))
    copies = {}
    if given.get("copies") == "none":
        copies = {"host_copy_bytes": 0}
        initial_value.WHOLE_BYTES = 0
    with gshard_tf.SpmdStrategy(mesh, process_local_batches=own, **copies).scope():
        model = classifier(given)
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile("adam", loss)
    saver = gshard_tf.CheckpointCallback(
        folder / "checkpoints", save_every=1, dataset=data
    )
    model.fit(
        data.dataset,
        epochs=int(given.get("epochs", EPOCHS)),
        steps_per_epoch=STEPS_PER_EPOCH,
        verbose=0,
        callbacks=[saver, Note(saver, index, folder, given)],
    )
    return model


if __name__ == "__main__":
    local, patience, place = int(sys.argv[1]), float(sys.argv[2]), sys.argv[3]
    options = dict(argument.split("=") for argument in sys.argv[4:])
    gshard_tf.request_cpu_devices(local)
    group = gshard_tf.initialize(step_timeout=patience, heartbeat_timeout=10)
    found = train(group.index, local * group.count, pathlib.Path(place), options)
    # Split weights are read by all processes together.
    print("weights", [float(np.sum(w)) for w in found.get_weights()])
