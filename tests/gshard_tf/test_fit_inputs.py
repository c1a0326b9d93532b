"""All that `fit`, `evaluate` and `predict` take, as in plain Keras."""

import keras
import numpy as np
import parity
import pytest
import tensorflow as tf
from parity import assert_equal_runs

X, Y = parity.data(32)
WEIGHTS = np.linspace(0.1, 2.0, 32).astype("float32")
FIT = {"batch_size": 16, "epochs": 2, "verbose": 0, "shuffle": False}


def fit(model):
    return model.fit(X, Y, **FIT)


def test_the_methods_of_a_model():
    def use(model):
        found = [
            model.fit(
                X,
                Y,
                sample_weight=WEIGHTS,
                validation_data=(X[:16], Y[:16], WEIGHTS[:16]),
                **FIT,
            ).history,
            model.fit(X, Y, class_weight={0: 1.0, 1: 0.5, 2: 3.0}, **FIT).history,
            model.fit(X, Y, validation_split=0.5, **FIT).history,
            model.evaluate(X, Y, batch_size=16, verbose=0),
            model.evaluate(X, Y, sample_weight=WEIGHTS, batch_size=16, verbose=0),
            model.predict(X, batch_size=16, verbose=0),
            model.predict(X[:13], batch_size=16, verbose=0),
            model.predict_on_batch(X[:16]),
            model.train_on_batch(X[:16], Y[:16]),
            model.train_on_batch(X[:16], Y[:16], sample_weight=WEIGHTS[:16]),
            model.test_on_batch(X[:16], Y[:16], return_dict=True),
            np.array(model(X[:5])),
        ]
        return found

    assert_equal_runs(lambda: parity.compiled(weighted_metrics=["accuracy"]), use)


def test_steps_per_execution():
    # Three steps an epoch, two an execution; the last batch is short.
    x, y = parity.data(36)

    def use(model):
        history = model.fit(x, y, **FIT).history
        return history, model.predict(x, batch_size=16, verbose=0)

    assert_equal_runs(lambda: parity.compiled(steps_per_execution=2), use)


@pytest.mark.parametrize("by", ["model", "tensorflow"])
def test_run_eagerly(by):
    def make():
        return parity.compiled(run_eagerly=by == "model")

    def use(model):
        return fit(model).history, model.evaluate(X, Y), model.predict(X)

    tf.config.run_functions_eagerly(by == "tensorflow")
    try:
        plain = parity.run_plain(make, use)
        meshed = parity.run_on_mesh(make, use)
    finally:
        tf.config.run_functions_eagerly(False)
    parity.assert_close(meshed.result, plain.result, parity.RTOL, "results")
    parity.assert_same_state(meshed.model, plain.model)
    # Eager mode is for debugging: it runs on the host, operation by operation.
    assert meshed.strategy.programs == []


class Batches(keras.utils.PyDataset):
    def __len__(self):
        return 3

    def __getitem__(self, i):
        s = slice(16 * i, 16 * (i + 1))
        return self.x[s], self.y[s]

    def __init__(self):
        super().__init__()
        self.x, self.y = parity.data(36)


def generator():
    batches = Batches()
    for i in range(len(batches)):
        yield batches[i]


def endless():
    while True:
        yield from generator()


INPUTS = {
    "tf.data": lambda: {
        "x": tf.data.Dataset.from_tensor_slices(parity.data(36)).batch(16).prefetch(1)
    },
    "PyDataset": lambda: {"x": Batches()},
    "generator": lambda: {"x": endless(), "steps_per_epoch": 3},
    "tensors": lambda: dict(
        zip("xy", map(tf.constant, parity.data(36)), strict=True), batch_size=16
    ),
}


@pytest.mark.broad(4)
@pytest.mark.parametrize("kind", INPUTS)
def test_kinds_of_input(kind):
    def use(model):
        return model.fit(epochs=2, verbose=0, shuffle=False, **INPUTS[kind]()).history

    assert_equal_runs(parity.compiled, use)


def test_batches_of_many_lengths_compile_once_each():
    def batches():
        for n in (16, 3, 16, 3):
            yield parity.data(n)

    def use(model):
        spec = (
            tf.TensorSpec([None, 8, 4], tf.float32),
            tf.TensorSpec([None], tf.int32),
        )
        dataset = tf.data.Dataset.from_generator(batches, output_signature=spec)
        # (At the end of a dataset, plain Keras counts a step that it did not make.)
        return model.fit(
            dataset.repeat(), epochs=2, steps_per_epoch=4, verbose=0
        ).history

    _, meshed = assert_equal_runs(parity.compiled, use)
    assert len(meshed.strategy.programs) == 2
