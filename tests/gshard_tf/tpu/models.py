"""A small model for TPU tests, under a strategy or in plain Keras."""

import keras
import numpy as np
import tensorflow as tf

import gshard_tf
from keras_layers import Dropout, MoELayer

OPTIMIZERS = {
    "adam": lambda: keras.optimizers.Adam(0.01),
    "adafactor": lambda: keras.optimizers.Adafactor(0.01),
    "momentum": lambda: keras.optimizers.SGD(0.05, momentum=0.9),
    "sparse": lambda: keras.optimizers.SGD(0.05),
    "sparse adam": lambda: keras.optimizers.Adam(0.01),
    "accumulation": lambda: keras.optimizers.Adam(0.01, gradient_accumulation_steps=2),
    "average": lambda: keras.optimizers.Adam(
        0.01, use_ema=True, ema_overwrite_frequency=2
    ),
}
VOCABULARY, LENGTH, WIDTH, HIDDEN, EXPERTS = 24, 8, 16, 32, 8


class Table(keras.layers.Layer):
    """An embedding whose rows are split; its gradient is sparse on request."""

    def __init__(self, sparse=False, **kwargs):
        super().__init__(**kwargs)
        self.sparse = sparse

    def get_config(self):
        return {**super().get_config(), "sparse": self.sparse}

    def build(self, shape):
        self.table = self.add_weight(
            shape=(VOCABULARY, WIDTH), name="table", initializer="random_normal"
        )
        gshard_tf.name_axes(self.table, ("vocab", "embed"))

    def call(self, ids):
        if self.sparse:
            return tf.gather(self.table.value, ids)
        return tf.one_hot(ids, VOCABULARY) @ tf.convert_to_tensor(self.table)


def model(optimizer="adam", dropout=0.0, steps_per_execution=1):
    """Tokens `[B, L]` -> `[B, L, 2]`."""
    keras.utils.set_random_seed(3)
    ids = keras.Input((LENGTH,), dtype="int32")
    x = Table(optimizer.startswith("sparse"), name="embedding")(ids)
    x = Dropout(dropout, seed=5)(x)
    x = x + MoELayer(EXPERTS, HIDDEN, dropout=dropout, seed=7, name="moe")(x)
    result = keras.Model(ids, keras.layers.Dense(2, name="outer")(x))
    result.compile(
        OPTIMIZERS[optimizer](),
        "mse",
        metrics=["mae"],
        steps_per_execution=steps_per_execution,
    )
    return result


def data(examples=32):
    rng = np.random.default_rng(0)
    ids = rng.integers(0, VOCABULARY, [examples, LENGTH]).astype("int32")
    return ids, rng.normal(size=[examples, LENGTH, 2]).astype("float32")


def difference(ours, theirs):
    """Largest absolute difference of two lists of variables or arrays."""
    return max(
        float(np.max(np.abs(np.array(a) - np.array(b))))
        for a, b in zip(ours, theirs, strict=True)
    )
