"""The promises of Keras that `gshard_tf.compat.keras_epochs` relies on."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from gshard_tf.compat.keras_epochs import running_fit, start_at_epoch


class Looking(keras.callbacks.Callback):
    """Asks for the running `fit` wherever Keras calls."""

    def __init__(self, begin_at=0, leave_after=None):
        super().__init__()
        self.begin_at, self.leave_after = begin_at, leave_after
        self.batches, self.left, self.fits = [], [], []

    def on_train_begin(self, logs=None):
        self.fits.append(running_fit(self.model))

    def on_epoch_begin(self, epoch, logs=None):
        if epoch == 0:
            running_fit(self.model).begin_epoch_at(self.begin_at, {})

    def on_train_batch_end(self, batch, logs=None):
        self.batches.append(batch)
        if len(self.batches) == self.leave_after:
            self.model.stop_training = True

    def on_epoch_end(self, epoch, logs=None):
        self.left.append(running_fit(self.model).left_early())


def model():
    made = keras.Sequential([keras.layers.Input([1]), keras.layers.Dense(1)])
    made.compile("sgd", "mse")
    return made


def batches():
    return tf.data.Dataset.from_tensor_slices((np.ones([12, 1]), np.ones([12]))).batch(
        4
    )


def test_a_callback_finds_its_fit():
    made, looking = model(), Looking()
    made.fit(batches(), verbose=0, callbacks=[looking])
    [fit] = looking.fits
    assert looking in fit.callbacks
    assert (fit.steps, fit.steps_per_execution, fit.reads_all) == (3, 1, True)
    assert running_fit(made) is None


def test_a_callback_says_at_which_epoch_fit_starts():
    made, epochs = model(), []
    starting = keras.callbacks.LambdaCallback(
        on_train_begin=lambda logs: start_at_epoch(made, 2),
        on_epoch_begin=lambda epoch, logs: epochs.append(epoch),
    )
    made.fit(batches(), epochs=4, verbose=0, callbacks=[starting])
    assert epochs == [2, 3]
    start_at_epoch(made, None)
    made.fit(batches(), epochs=2, verbose=0)
    assert len(made.history.epoch) == 2


def test_one_epoch_begins_late_and_the_next_is_whole():
    looking = Looking(begin_at=2)
    model().fit(batches(), epochs=2, verbose=0, callbacks=[looking])
    assert looking.batches == [2, 0, 1, 2] and looking.left == [False, False]


@pytest.mark.parametrize("known", [True, False])
def test_why_an_epoch_ended(known):
    data = batches() if known else batches().filter(lambda x, y: True)
    looking = Looking(leave_after=5)
    model().fit(data, epochs=3, verbose=0, callbacks=[looking])
    assert looking.left == [False, True]
    # Data that runs out is no leaving.
    looking = Looking()
    model().fit(data, steps_per_epoch=5, verbose=0, callbacks=[looking])
    assert looking.batches == [0, 1, 2] and looking.left == [False]


class Noting(keras.callbacks.Callback):
    """Notes who is called when, and may put itself first or change the logs."""

    def __init__(self, name, calls, first=False):
        super().__init__()
        self.name, self.calls, self.first = name, calls, first

    def on_train_begin(self, logs=None):
        self.calls.append(("begin", self.name))
        if self.first:
            running_fit(self.model).put_first(self)

    def on_train_batch_end(self, batch, logs=None):
        self.calls.append((logs["loss"] == -1.0, self.name))
        if self.first:
            logs["loss"] = -1.0

    on_epoch_end = on_train_batch_end


def test_a_callback_is_put_first_and_its_logs_are_those_of_all():
    calls = []
    given = [Noting(name, calls, first=name == "c") for name in "abcd"]
    history = model().fit(
        batches(), steps_per_epoch=1, verbose=0, callbacks=list(given)
    )
    assert calls[:4] == [("begin", name) for name in "abcd"]
    once = [(False, "c"), (True, "a"), (True, "b"), (True, "d")]
    assert calls[4:] == once + once
    assert history.history["loss"] == [-1.0]


class Asking(keras.callbacks.Callback):
    """Why the data is not at step 2 of an epoch, nor at the beginning of one."""

    def on_train_begin(self, logs=None):
        fit = running_fit(self.model)
        self.reasons = [fit.why_not_at(2), fit.why_not_at(0)]


@pytest.mark.parametrize("shuffle", [True, False, "batch"])
@pytest.mark.parametrize("seed", [None, 3])
def test_whether_arrays_are_in_the_order_of_before(shuffle, seed):
    tf.random.set_seed(seed)
    made, asking, x = model(), Asking(), np.arange(12.0)[:, None]
    seen = []
    made.train_step = lambda data: {"first": tf.reduce_sum(data[0] * [[1.0], [13.0]])}
    noting = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda batch, logs: seen.append(float(logs["first"]))
    )
    options = {"batch_size": 2, "epochs": 4, "verbose": 0, "shuffle": shuffle}
    made.fit(x, x, callbacks=[asking, noting], **options)
    passes = [seen[i : i + 6] for i in range(0, 24, 6)]
    in_order = asking.reasons[0] is None
    assert in_order == all(p == passes[0] for p in passes)
    assert in_order == (seed is not None or not shuffle)
    assert asking.reasons[1] is None
