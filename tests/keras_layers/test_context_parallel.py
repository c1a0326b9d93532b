"""Attention over a split length: plain Keras on one device, and what is sent."""

import collections

import keras
import numpy as np
import parity
import pytest
import tensorflow as tf

import gshard_tf
from keras_layers import MultiHeadAttention, Transformer

B, L, M, N = 4, 32, 16, 8
MESH = {"data": 2, "seq": 4}
RULES = {"batch": "data", "length": "seq"}


class _Attention(keras.layers.Layer):
    """Causal self-attention, of which every third token is padding."""

    def __init__(self, context_parallel, dropout):
        super().__init__()
        self.attention = MultiHeadAttention(
            N, 4, dropout, seed=1, context_parallel=context_parallel
        )

    def call(self, x, training=None):
        x = gshard_tf.annotate(x, ("batch", "length", None))
        mask = tf.range(L)[None] % 3 < 2 * tf.ones([tf.shape(x)[0], 1], tf.int32)
        return x + self.attention(x, mask=mask, causal=True, training=training)


def _model(kind, dropout=0.1):
    def make():
        inputs = keras.Input([L, M])
        model = keras.Model(inputs, _Attention(kind, dropout)(inputs))
        model.compile(keras.optimizers.Adam(1e-2), "mse")
        return model

    return make


def _use(model):
    x = np.random.default_rng(0).normal(size=[B, L, M]).astype("float32")
    losses = model.fit(x, x[:, ::-1], batch_size=B, epochs=2, verbose=0).history["loss"]
    return losses, model.predict(x, batch_size=B, verbose=0)


def _sent(program):
    return collections.Counter(
        each.kind for each in program.collectives() if each.kind != "all-reduce"
    )


@pytest.mark.broad(2)
@pytest.mark.parametrize("kind", ["ring", "all_to_all"])
def test_training_equals_one_device(kind):
    rules = gshard_tf.AxisRules(RULES)
    _, meshed = parity.assert_equal_runs(_model(kind), _use, MESH, rules=rules)
    # Keys, values and their ids go around; or queries, keys and values go to heads, and
    # the results back. The outputs are gathered for the host.
    sent = {"ring": {"collective-permute": 3}, "all_to_all": {"all-to-all": 4}}[kind]
    assert _sent(meshed.strategy.programs[-1]) == {**sent, "all-gather": 1}


@pytest.mark.slow
@pytest.mark.parametrize(("remat", "stacked"), [(False, False), (True, True)])
def test_a_transformer_over_a_split_length(remat, stacked):
    """Self- and cross-attention, masks of padding, remat, loops over layers."""

    def make():
        options = {"dropout": 0.1, "seed": 3, "remat": remat, "stacked": stacked}
        model = Transformer(20, 20, 2, 1, M, 32, 4, context_parallel="ring", **options)
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(keras.optimizers.SGD(0.1, momentum=0.9), loss)
        return model

    def use(model):
        ids = np.random.default_rng(0).integers(0, 20, [B, L]).astype("int32")
        data = tf.data.Dataset.from_tensors(((ids, ids), ids))
        return model.fit(data, epochs=2, verbose=0).history["loss"]

    rules = gshard_tf.AxisRules(RULES)
    _, meshed = parity.assert_equal_runs(make, use, MESH, rules=rules)
    assert _sent(meshed.strategy.programs[-1])["collective-permute"] > 3 * 9


def test_memory_falls_with_the_devices():
    def build():
        inputs = keras.Input([2048, M])
        x = MultiHeadAttention(2, 8, context_parallel="ring")(inputs, causal=True)
        model = keras.Model(inputs, x)
        model.compile("sgd", "mse")
        return model

    rules = gshard_tf.AxisRules({"length": "seq"})
    x = tf.TensorSpec([1, 2048, M])
    found = [
        gshard_tf.plan(build, f"cpu:{n}", {"seq": n}, rules, (x, x), cache=False)
        for n in (2, 8)
    ]
    temporary = [plan.memory.temporaries for plan in found]
    # Scores are a share of a share: 1/16.
    assert temporary[1] < temporary[0] / 4


def test_errors():
    with pytest.raises(ValueError, match="`context_parallel` must be one of"):
        MultiHeadAttention(2, 4, context_parallel="circle")
    layer = MultiHeadAttention(6, 4, context_parallel="all_to_all")
    assert layer.get_config()["context_parallel"] == "all_to_all"
    rules = gshard_tf.AxisRules(RULES)
    strategy = parity.strategy_of(MESH, rules=rules)
    with strategy.scope():
        layer.build([B, L, M])
    with pytest.raises(ValueError, match="needs heads that no rule splits"):
        strategy.run(tf.function(layer), args=(tf.ones([B, L, M]),))
