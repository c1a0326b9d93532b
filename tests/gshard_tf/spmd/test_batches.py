"""Every batch reaches the step once and in order, as in plain Keras."""

import random

import keras
import numpy as np
import parity
import pytest
import tensorflow as tf

SPEC = (tf.TensorSpec([8, 1]), tf.TensorSpec([8, 1]))


def batch(i):
    return np.full((8, 1), i, "float32"), np.full((8, 1), i, "float32")


class Data(keras.utils.PyDataset):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.hooks = []

    def __len__(self):
        return 8

    def __getitem__(self, i):
        return batch(i)

    def on_epoch_begin(self):
        self.hooks.append("begin")

    def on_epoch_end(self):
        self.hooks.append("end")


def generator():
    for i in range(8):
        yield batch(i)


def over_one_iterator():
    one = generator()
    return tf.data.Dataset.from_generator(lambda: one, output_signature=SPEC)


class Looking(keras.Model):
    """Its steps say which batch they got, and train nothing."""

    def __init__(self):
        super().__init__()
        self.dense = keras.layers.Dense(1, kernel_initializer="ones")

    def call(self, x):
        return self.dense(x)

    def train_step(self, data):
        return {"batch": tf.reduce_max(data[1])}

    test_step = train_step


class Seen(keras.callbacks.Callback):
    def __init__(self):
        super().__init__()
        self.batches = []

    def on_train_batch_end(self, step, logs=None):
        self.batches.append(int(logs["batch"]))

    def on_test_batch_end(self, step, logs=None):
        self.batches.append(-int(logs["batch"]))


def make():
    model = Looking()
    model.compile("sgd")
    return model


INPUTS = {
    "PyDataset, a short queue": lambda: Data(workers=3, max_queue_size=2),
    "PyDataset": Data,
    "generator": generator,
    "PyDataset, workers": lambda: Data(workers=2),
    "dataset over one iterator": over_one_iterator,
}


@pytest.mark.broad(2)
@pytest.mark.parametrize("kind", INPUTS)
def test_no_batch_is_lost_or_moved(kind):
    def use(model):
        random.seed(5)  # by which Keras shuffles a PyDataset
        seen, data = Seen(), INPUTS[kind]()
        epochs = 2 if isinstance(data, Data) else 1
        model.fit(
            data,
            epochs=epochs,
            validation_data=INPUTS[kind](),
            callbacks=[seen],
            verbose=0,
        )
        model.evaluate(INPUTS[kind](), callbacks=[seen], verbose=0)
        predicted = model.predict(INPUTS[kind](), verbose=0)
        return seen.batches, predicted, getattr(data, "hooks", None)

    plain, meshed = (run(make, use).result for run in (parity.run_plain, on_mesh))
    assert meshed[0] == plain[0]
    assert sorted(plain[0][:8]) == list(range(8))
    np.testing.assert_array_equal(meshed[1], plain[1])
    assert meshed[2] == plain[2]


def on_mesh(make, use):
    return parity.run_on_mesh(make, use, {"data": 4})


def test_arrays_are_shuffled_alike():
    x = np.arange(64, dtype="float32").reshape(64, 1)

    def use(model):
        seen = Seen()
        model.fit(x, x, batch_size=8, epochs=2, callbacks=[seen], verbose=0)
        return seen.batches

    assert on_mesh(make, use).result == parity.run_plain(make, use).result
