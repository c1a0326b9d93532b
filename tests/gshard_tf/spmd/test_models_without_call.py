"""Models that Keras cannot build from a batch train as in plain Keras."""

import keras
import numpy as np
import parity
import pytest
import tensorflow as tf
from keras import layers, ops

import gshard_tf

X = np.random.default_rng(0).random((16, 4)).astype("float32")


def dense(inputs, units):
    # (A bias cancels in several of these losses, and its gradient is rounding.)
    layer = layers.Dense(units, use_bias=False)
    return keras.Sequential([keras.Input([inputs]), layer])


def update(optimizer, tape, loss, weights):
    optimizer.apply(tape.gradient(loss, weights), weights)


class Vae(keras.Model):
    """As keras.io's: layers of its own, trackers, no `call`."""

    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = dense(4, 2), dense(2, 4)
        self.seeds = keras.random.SeedGenerator(3)
        self.tracker = keras.metrics.Mean(name="loss")

    @property
    def metrics(self):
        return [self.tracker]

    def train_step(self, x):
        with tf.GradientTape() as tape:
            mean = self.encoder(x)
            # (Keras's own random numbers are others under XLA, in plain Keras too.)
            noise = gshard_tf.random.uniform(self.seeds.next(), ops.shape(mean))
            decoded = self.decoder(mean + 0.1 * noise)
            loss = ops.mean((x - decoded) ** 2) + ops.mean(mean**2)
        update(self.optimizer, tape, loss, self.trainable_weights)
        self.tracker.update_state(loss)
        return {"loss": self.tracker.result()}


class Gan(keras.Model):
    """As keras.io's DCGAN and WGAN: two optimizers, given to `compile`."""

    def __init__(self):
        super().__init__()
        self.generator, self.discriminator = dense(4, 4), dense(4, 1)

    def compile(self, d_optimizer, g_optimizer):
        super().compile()
        self.d_optimizer, self.g_optimizer = d_optimizer, g_optimizer

    def train_step(self, real):
        with tf.GradientTape() as tape:
            made = self.generator(real[:, ::-1])
            d_loss = ops.mean(self.discriminator(made) - self.discriminator(real))
        update(self.d_optimizer, tape, d_loss, self.discriminator.trainable_weights)
        with tf.GradientTape() as tape:
            g_loss = -ops.mean(self.discriminator(self.generator(real[:, ::-1])))
        update(self.g_optimizer, tape, g_loss, self.generator.trainable_weights)
        return {"loss": g_loss, "d_loss": d_loss}


class Ddim(keras.Model):
    """As keras.io's: a compiled loss, called by the step."""

    def __init__(self):
        super().__init__()
        self.network = dense(4, 4)

    def train_step(self, x):
        with tf.GradientTape() as tape:
            loss = self.loss(x, self.network(x))
        update(self.optimizer, tape, loss, self.network.trainable_weights)
        return {"loss": loss}

    def test_step(self, x):
        return {"loss": self.loss(x, self.network(x))}


class Triplet(keras.Model):
    """As keras.io's siamese network: `call` takes the three parts of a batch."""

    def __init__(self):
        super().__init__()
        self.network = dense(4, 3)

    def call(self, batch):
        anchor, positive, negative = (self.network(part) for part in batch)
        near = ops.sum((anchor - positive) ** 2, -1)
        return near, ops.sum((anchor - negative) ** 2, -1)

    def train_step(self, batch):
        with tf.GradientTape() as tape:
            near, far = self(batch)
            loss = ops.mean(ops.relu(near - far + 0.5))
        update(self.optimizer, tape, loss, self.network.trainable_weights)
        return {"loss": loss}


def sgd():
    return keras.optimizers.SGD(0.1, momentum=0.9)


KINDS = {
    "vae": (Vae, lambda model: model.compile("adam")),
    "gan": (Gan, lambda model: model.compile(sgd(), keras.optimizers.Adam())),
    "ddim": (Ddim, lambda model: model.compile(sgd(), keras.losses.MeanSquaredError())),
    "triplet": (Triplet, lambda model: model.compile(sgd())),
}


@pytest.mark.parametrize("kind", KINDS)
def test_trains_as_in_plain_keras(kind):
    kind, compile_model = KINDS[kind]

    def make():
        model = kind()
        compile_model(model)
        return model

    def use(model):
        data = (X, X[::-1].copy(), 2 * X) if kind is Triplet else X
        batches = tf.data.Dataset.from_tensor_slices(data).batch(8)
        found = [model.fit(batches, epochs=2, verbose=0).history]
        if kind is Ddim:
            found.append(model.evaluate(batches, verbose=0))
        weights = [w.numpy() for w in model.trainable_weights]
        return found, weights

    plain = parity.run_plain(make, use)
    meshed = parity.run_on_mesh(make, use, {"data": 4})
    assert meshed.strategy.programs
    parity.assert_close(meshed.result, plain.result, parity.RTOL, kind.__name__)
