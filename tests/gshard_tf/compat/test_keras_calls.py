"""What Keras keeps of a call that is going on: the promise of `compat.keras_calls`."""

import keras
import numpy as np

import gshard_tf
from gshard_tf.compat import keras_calls


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


class Reader(keras.layers.Layer):
    """Notes the dtypes in which a weight is read in a call."""

    def build(self, input_shape):
        self.scale = self.add_weight(shape=(), initializer="ones")

    def call(self, x):
        again = keras_calls.current_autocast()
        dtypes = [self.scale + 0]
        with keras_calls.no_autocast():
            dtypes.append(self.scale + 0)
            with again():
                dtypes.append(self.scale + 0)
        self.dtypes = [keras.backend.standardize_dtype(x.dtype) for x in dtypes]
        self.add_loss(keras.ops.sum(x))
        return x


def test_autocast_off_and_on_again():
    reader = Reader(dtype="mixed_bfloat16")
    reader(np.ones((2, 2)))
    assert reader.dtypes == ["bfloat16", "float32", "bfloat16"]
    with keras_calls.current_autocast()():
        assert keras.backend.standardize_dtype((reader.scale + 0).dtype) == "float32"


def test_losses_are_cleared():
    reader = Reader()
    reader(np.ones((2, 2)))
    assert len(reader.losses) == 1
    keras_calls.clear_losses(reader)
    assert not reader.losses
