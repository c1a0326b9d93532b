"""A small run that can be stopped anywhere."""

import keras
import numpy as np
import parity
import tensorflow as tf

import gshard_tf

STEPS, EPOCHS = 5, 2


class Stop(Exception):
    """What ends a run before its time."""


class Losses(keras.callbacks.Callback):
    """Notes the loss of every step, and stops after one of them."""

    def __init__(self, stop_after=None):
        super().__init__()
        self.seen, self.epochs = [], []
        self.stop_after = stop_after

    def on_train_batch_end(self, batch, logs=None):
        self.seen.append((logs["loss"], logs["accuracy"]))
        if len(self.seen) == self.stop_after:
            raise Stop

    def on_epoch_end(self, epoch, logs=None):
        self.epochs.append((epoch, dict(logs)))


def data(**kwargs):
    x, y = parity.data(48)
    dataset = tf.data.Dataset.from_tensor_slices((x, y))
    dataset = dataset.shuffle(20, seed=3).repeat().batch(16).prefetch(2)
    return gshard_tf.ResumableDataset(dataset, **kwargs)


def model(optimizer="adam"):
    keras.utils.set_random_seed(7)
    made = parity.classifier(dropout=0.3)
    made.compile(
        optimizer=optimizer,
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    return made


def scoped(mesh, make=model, **kwargs):
    """A model on a mesh; on none, for None."""
    if mesh is None:
        made = make(**kwargs)
        made.jit_compile = False  # quicker to start
        parity.build_optimizer(made)
        return made
    with parity.strategy_of(mesh).scope():
        return make(**kwargs)


def fit(made, callbacks, feed=None, epochs=EPOCHS):
    feed = feed or data()
    x, y = parity.data(16, seed=5)
    return made.fit(
        feed.dataset,
        epochs=epochs,
        steps_per_epoch=STEPS,
        validation_data=(x, y),
        verbose=0,
        callbacks=callbacks,
    )


def run(folder, mesh=8, stop_after=None, epochs=EPOCHS, **kwargs):
    """Begins a run or goes on with it: the model and what it noted."""
    keras.utils.set_random_seed(7)  # the shuffling's too
    feed = data()
    made = scoped(mesh)
    losses = Losses(stop_after)
    saver = gshard_tf.CheckpointCallback(folder, dataset=feed, **kwargs)
    try:
        fit(made, [saver, losses], feed, epochs)
    except Stop:
        saver.manager.close()
    return made, losses, saver


def assert_same_bits(ours, theirs):
    ours, theirs = gshard_tf.training_state(ours), gshard_tf.training_state(theirs)
    # Metrics may not have been made yet.
    assert {n for n in {*ours} ^ {*theirs} if not n.startswith("metrics/")} == set()
    for name in {*ours} & {*theirs}:
        value = theirs[name]
        np.testing.assert_array_equal(ours[name].numpy(), value.numpy(), err_msg=name)
