"""When layers count into their metrics, and the names that logs have for them."""

import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf
from parity import assert_close, assert_equal_runs

from keras_layers import MoELayer, Transformer

TIGHT = {"capacity_factor": 0.5, "second_expert_policy": "all"}
X = np.random.default_rng(0).normal(size=(8, 6, 4)).astype("float32")
IDS = np.random.default_rng(0).integers(3, 12, (8, 6)).astype("int32")


def mixture(router=TIGHT, run_eagerly=False, **options):
    inputs = keras.Input([6, 4])
    moe = MoELayer(4, 8, router=router, router_metrics="all", name="moe", **options)
    model = keras.Model(inputs, keras.layers.Dense(1)(moe(inputs)))
    model.compile("sgd", "mse", jit_compile=False, run_eagerly=run_eagerly)
    return model


def transformer(**arguments):
    model = Transformer(
        12,
        12,
        2,
        1,
        8,
        16,
        2,
        num_experts=4,
        moe_every=1,
        moe_options={"router": TIGHT},
        seed=1,
        **arguments,
    )
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile("sgd", loss, jit_compile=False)
    return model


KINDS = {
    "mixture": (mixture, X, X[..., :1]),
    "transformer": (transformer, (IDS, IDS), IDS),
    "remat": (lambda: transformer(remat=True), (IDS, IDS), IDS),
    "stacked": (lambda: transformer(stacked=True, remat=True), (IDS, IDS), IDS),
}


def assigning(concrete):
    graph = concrete.graph.as_graph_def()
    nodes = [*graph.node, *(n for f in graph.library.function for n in f.node_def)]
    return [node.name for node in nodes if "Assign" in node.op]


BIASED = {"kind": "top_k", "scores": "sigmoid", "bias_update_rate": 0.1, "jitter": 0.1}


@pytest.mark.broad(4)
@pytest.mark.parametrize("kind", [*KINDS, "biased"])
def test_a_graph_of_inference_assigns_nothing(kind):
    biased = (lambda: mixture(BIASED, dropout=0.1, num_shared_experts=1), X, None)
    make, x, _ = KINDS.get(kind, biased)
    model = make()
    model(x)
    for training in (False, None):
        forward = tf.function(lambda x, mode=training: model(x, training=mode))
        assert not assigning(forward.get_concrete_function(x))
    train = tf.function(lambda x: model(x, training=True))
    assert assigning(train.get_concrete_function(x))


@pytest.mark.broad(4)
@pytest.mark.parametrize("kind", KINDS)
def test_evaluation_counts_what_it_counts_eagerly(kind):
    make, x, y = KINDS[kind]
    model = make()
    found = model.evaluate(x, y, batch_size=4, verbose=0, return_dict=True)
    counted = [variable.numpy() for variable in model.metrics_variables]
    model.predict(x, verbose=0)
    for variable, value in zip(model.metrics_variables, counted, strict=True):
        np.testing.assert_array_equal(variable, value)
    model.run_eagerly = True
    expected = model.evaluate(x, y, batch_size=4, verbose=0, return_dict=True)
    assert_close(found, expected, 1e-5, kind)
    assert max(v for name, v in found.items() if name.endswith("_dropped")) > 0.1


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["mixture", "stacked"])
def test_evaluation_on_a_mesh_counts_the_same(kind):
    make, x, y = KINDS[kind]

    def use(model):
        options = {"batch_size": 4, "verbose": 0}
        history = model.fit(x, y, validation_data=(x, y), shuffle=False, **options)
        return history.history, model.predict(x, **options)

    plain, _ = assert_equal_runs(make, use, mesh=4)
    names = [n for n in plain.result[0] if n.endswith("_dropped")]
    assert any(n.startswith("val_") and plain.result[0][n][0] > 0.1 for n in names)


def test_counts_of_one_step_add_up():
    """A step that calls the layer twice counts both."""
    model = mixture()
    moe = model.get_layer("moe")

    @tf.function
    def step(x):
        model(x, training=False)
        model(x, training=False)
        return moe.health.result()["moe_dropped"]

    step(X)
    assert float(moe.health.tokens) == 2 * 8 * 6


def test_what_is_counted_in_an_inner_function_is_missed_aloud():
    class Inner(keras.Model):
        def __init__(self):
            super().__init__()
            self.moe = MoELayer(4, 8, name="moe")
            self.apply = tf.function(lambda x: self.moe(x, training=False))

        def call(self, x):
            return self.apply(x)

    model = Inner()
    model.compile(loss="mse", jit_compile=False)
    with pytest.warns(UserWarning, match="'inner/moe' leave out counts"):
        model.evaluate(X, X, verbose=0)
    model.run_eagerly = True
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model.predict(X, verbose=0)


class Block(keras.layers.Layer):
    def __init__(self, capacity_factor, moe_name, **kwargs):
        super().__init__(**kwargs)
        router = {**TIGHT, "capacity_factor": capacity_factor, "seed": 1}
        self.moe = MoELayer(4, 8, router=router, name=moe_name)

    def build(self, shape):
        self.moe.build(shape)

    def call(self, x, training=None):
        return x + self.moe(x, training=training)


def two_blocks(names):
    def make():
        x = inputs = keras.Input([6, 4])
        for block, factor, name in zip("ab", (0.5, 8.0), names, strict=True):
            x = Block(factor, name, name=block)(x)
        model = keras.Model(inputs, keras.layers.Dense(1)(x))
        model.compile("sgd", "mse", jit_compile=False)
        return model

    return make


@pytest.mark.parametrize(
    "how",
    [
        "eager",
        pytest.param("graph", marks=pytest.mark.slow),
        pytest.param("mesh", marks=pytest.mark.slow),
    ],
)
def test_layers_of_one_name_are_told_apart(how):
    """Their logs are those of layers that have the qualified names."""

    def use(model):
        model.run_eagerly = how == "eager"
        history = model.fit(X, X[..., :1], batch_size=4, shuffle=False, verbose=0)
        evaluated = model.evaluate(X, X[..., :1], verbose=0, return_dict=True)
        return history.history, evaluated

    keras.utils.set_random_seed(7)
    expected = use(two_blocks(["a_moe", "b_moe"])())
    if how == "mesh":
        found = assert_equal_runs(two_blocks(["moe", "moe"]), use, mesh=4)[1].result
    else:
        keras.utils.set_random_seed(7)
        found = use(two_blocks(["moe", "moe"])())
    assert_close(found, expected, 1e-4, how)
    assert expected[0]["a_moe_dropped"][0] > 0.1 > expected[0]["b_moe_dropped"][0]


def test_layers_of_one_name_and_path_are_numbered():
    class Twice(keras.Model):
        def __init__(self):
            super().__init__()
            self.blocks = [Block(0.5, "moe", name="b"), Block(8.0, "moe", name="b")]

        def call(self, x):
            return self.blocks[1](self.blocks[0](x))

    model = Twice()
    model.compile("sgd", "mse", run_eagerly=True)
    history = model.fit(X, X, verbose=0).history
    assert history["1_moe_dropped"][0] > 0.1 > history["2_moe_dropped"][0]


@pytest.mark.slow  # as other layers of one name are
@pytest.mark.parametrize("stacked", [False, True])
def test_two_transformers_in_a_model_are_told_apart(stacked):
    class Both(keras.Model):
        def __init__(self):
            super().__init__()
            self.one = transformer(stacked=stacked, name="one")
            self.two = transformer(stacked=stacked, name="two")

        def call(self, ids):
            return self.one(ids) + self.two(ids)

    model = Both()
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    # Which names there are is the same in a graph, which takes five times as long.
    model.compile("sgd", loss, run_eagerly=True)
    history = model.fit((IDS, IDS), IDS, verbose=0).history
    layers = ("encoder_1", "encoder_2", "decoder_1")
    expected = {f"{m}_{layer}_moe_dropped" for m in ("one", "two") for layer in layers}
    assert {name for name in history if name.endswith("_dropped")} == expected


def test_models_of_their_own_keep_their_names():
    for _ in range(2):
        history = mixture(run_eagerly=True).fit(X, X[..., :1], verbose=0).history
        assert "moe_dropped" in history
