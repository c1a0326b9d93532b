"""What is relied on of Keras's loop of several steps."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from gshard_tf.compat.keras_loops import steps_of_loop

X = np.zeros([6, 2], "float32")


@pytest.fixture
def traced():
    """A model that notes the length of the loop in which a step is traced."""
    seen = []

    class Noting(keras.Sequential):
        def train_step(self, data):
            seen.append(steps_of_loop())
            return {"loss": tf.reduce_sum(data[0]) + tf.cast(seen[-1], tf.float32)}

        def test_step(self, data):
            seen.append(steps_of_loop())
            return {"loss": tf.reduce_sum(data[0])}

        def predict_step(self, data):
            seen.append(steps_of_loop())
            return data[0]

    def model(steps):
        seen.clear()
        model = Noting([keras.layers.Input([2]), keras.layers.Dense(2)])
        model.compile("sgd", "mse", steps_per_execution=steps)
        return model, seen

    return model


def test_the_loop_is_known_by_its_frames(traced):
    model, seen = traced(3)
    model.fit(X, X, batch_size=1, verbose=0)
    assert set(seen) == {3}
    seen.clear()
    model.evaluate(X, X, batch_size=1, verbose=0)
    assert set(seen) == {3}
    seen.clear()
    # All of its results are used.
    model.predict(X, batch_size=1, verbose=0)
    assert set(seen) == {1}


def test_without_a_loop_all_results_are_used(traced):
    model, seen = traced(1)
    model.fit(X, X, batch_size=1, verbose=0)
    model.train_on_batch(X, X)
    assert set(seen) == {1} and steps_of_loop() == 1


def test_the_loop_keeps_the_results_of_its_last_step(traced):
    model, _ = traced(3)
    x = np.arange(6, dtype="float32").reshape(6, 1) * [[1.0, 0.0]]
    losses = []
    noting = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda batch, logs: losses.append(logs["loss"])
    )
    model.fit(x, x, batch_size=1, shuffle=False, verbose=0, callbacks=[noting])
    # Sums of the third and the sixth row, and the 3 that `train_step` adds.
    assert losses == [2.0 + 3.0, 5.0 + 3.0]
