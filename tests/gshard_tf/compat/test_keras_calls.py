"""What Keras keeps of a call that is going on: the promise of `compat.keras_calls`."""

import keras
import numpy as np

import gshard_tf


def test_which_optimizer_accumulates():
    class Probe(keras.layers.Layer):
        def call(self, x):
            self.found = gshard_tf.accumulated_batches()
            return x

    def found(optimizer):
        probe = Probe()
        model = keras.Sequential([keras.Input((2,)), probe, keras.layers.Dense(1)])
        model.compile(optimizer, "mse", run_eagerly=True)
        model.train_on_batch(np.ones((2, 2)), np.ones((2, 1)))
        return probe.found

    sgd = keras.optimizers.SGD
    assert found(sgd()) == 1
    assert found(sgd(gradient_accumulation_steps=3)) == 3
    scaled = keras.optimizers.LossScaleOptimizer(sgd(gradient_accumulation_steps=2))
    assert found(scaled) == 2
    probe = Probe()
    probe(np.ones((2, 2)))
    assert probe.found is None
    assert gshard_tf.accumulated_batches() is None
