"""A process of a run; its arguments: devices, patience, folder, and what goes wrong."""

import json
import os
import pathlib
import sys
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")

import keras
import numpy as np
import parity
import tensorflow as tf

import gshard_tf

DEVICES, PATIENCE, FOLDER = int(sys.argv[1]), float(sys.argv[2]), sys.argv[3]
GIVEN = dict(argument.split("=") for argument in sys.argv[4:])
STEPS_PER_EPOCH, EPOCHS, BATCH = 4, 2, 16

gshard_tf.request_cpu_devices(DEVICES)
group = gshard_tf.join_processes(patience=PATIENCE, heartbeat=10)
folder = pathlib.Path(FOLDER)

x, y = parity.data(48)
dataset = tf.data.Dataset.from_tensor_slices((x, y)).shuffle(20, seed=3).repeat()
dataset = dataset.batch(BATCH, drop_remainder=True)
own = GIVEN.get("rows") == "own"
if own:
    dataset = dataset.map(lambda *batch: gshard_tf.own_rows(batch))
data = gshard_tf.ResumableData(dataset, position="count")

keras.utils.set_random_seed(7 + group.index * ("seeds" in GIVEN))
mesh = gshard_tf.create_mesh({"expert": DEVICES * group.count})
with gshard_tf.SpmdStrategy(mesh, own_rows=own).scope():
    model = parity.classifier(dropout=0.3)
    model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
saver = gshard_tf.SaveCheckpoints(folder / "checkpoints", every=1, data=data)


class Note(keras.callbacks.Callback):
    def on_train_batch_end(self, batch, logs=None):
        with open(folder / f"losses-{group.index}.txt", "a") as file:
            row = {"step": saver.step, "loss": float(logs["loss"])}
            file.write(json.dumps(row) + "\n")
        if saver.step == int(GIVEN.get("step", 0)) and group.index == 1:
            if GIVEN["do"] == "raise":
                raise RuntimeError("the disk of this host is on fire")
            if GIVEN["do"] == "hang":
                time.sleep(1000)
            if GIVEN["do"] == "die":
                os.kill(os.getpid(), 9)


model.fit(
    data.dataset,
    epochs=EPOCHS,
    steps_per_epoch=STEPS_PER_EPOCH,
    verbose=0,
    callbacks=[saver, Note()],
)
predicted = model.predict(x[:6], batch_size=6, verbose=0) if not own else None
print("weights", [float(np.sum(w)) for w in model.get_weights()], predicted is None)
