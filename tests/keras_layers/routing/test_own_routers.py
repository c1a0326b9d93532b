"""Routers of a user's own, as the guide describes them; routers that layers share."""

import pathlib
import re

import keras
import numpy as np
import pytest
import tensorflow as tf
from parity import assert_equal_runs

from keras_layers import DecoderBlock, MoELayer, RouterStats, Top2Router, TopKRouter

GUIDE = pathlib.Path(__file__).resolve().parents[3] / "docs" / "layers.md"
X = np.random.default_rng(0).normal(size=(8, 6, 4)).astype("float32")


@pytest.fixture(scope="module")
def own_router():
    """The class in "Your own router" of the guide."""
    code = re.search(r"@keras.saving.*?return \{.*?\n", GUIDE.read_text(), re.DOTALL)
    from keras_layers import TokenChoiceRouting

    scope = {
        "keras": keras,
        "tf": tf,
        "TokenChoiceRouting": TokenChoiceRouting,
        "__name__": __name__,
    }
    exec(compile(code.group(), str(GUIDE), "exec"), scope)
    return scope["OneExpert"]


@pytest.mark.parametrize("padded", [False, True])
def test_the_guides_router_is_switch(own_router, padded):
    ours = MoELayer(4, 8, router=own_router(4), aux_loss_coef=1.0, name="moe")
    # Of 6 tokens in groups: C = 3, as `-(-2 * size // num_experts)` is.
    like = TopKRouter(4, 1, capacity_factor=2.0, normalize_weights=False)
    theirs = MoELayer(4, 8, router=like, aux_loss_coef=1.0, name="moe")
    mask = None
    if padded:
        mask = tf.constant(
            np.arange(6)[None] < np.array([6, 3, 0, 5, 6, 1, 2, 6])[:, None]
        )
    found = ours(X, mask=mask, training=True)
    theirs.build(X.shape)
    weights = {w.path.split("/")[-1]: w for w in ours.experts.weights}
    for weight in theirs.experts.weights:
        weight.assign(weights[weight.path.split("/")[-1]])
    theirs.router.kernel.assign(ours.router.gate.kernel)
    np.testing.assert_allclose(found, theirs(X, mask=mask, training=True), atol=1e-6)
    if not padded:  # the guide's loss counts padding among the gates
        np.testing.assert_allclose(ours.losses, theirs.losses, rtol=1e-5)
    for name, value in ours.health.result().items():
        np.testing.assert_allclose(value, theirs.health.result()[name], rtol=1e-5)


def model_with(*routers, **options):
    x = inputs = keras.Input([6, 4])
    for i, router in enumerate(routers):
        x = x + MoELayer(4, 8, router=router, name=f"moe_{i}", **options)(x)
    model = keras.Model(inputs, keras.layers.Dense(1)(x))
    model.compile("sgd", "mse", jit_compile=False)
    return model


def test_an_own_router_is_saved_and_loaded(own_router, tmp_path):
    model = model_with(own_router(4))
    model.fit(X, X[..., :1], verbose=0)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_allclose(loaded(X), model(X), rtol=1e-6)


def test_an_own_router_on_a_mesh(own_router):
    assert_equal_runs(
        lambda: model_with(own_router(4)),
        lambda model: model.fit(X, X[..., :1], shuffle=False, verbose=0),
        mesh=4,
    )


def returning(make_report):
    """A router of an own class whose second output is what `make_report` says."""

    class Mine(keras.layers.Layer):
        num_experts = 4

        def __init__(self):
            super().__init__()
            self.inner = TopKRouter(4, 1)

        def build(self, shape):
            self.inner.build(shape)

        def call(self, inputs, mask=None, training=None):
            routing, report = self.inner(inputs, mask=mask, training=training)
            return routing, make_report(report)

    return Mine()


def test_what_an_own_router_returns():
    whole = {"z_loss_coef": 0.1, "router_metrics": "all"}
    layer = MoELayer(4, 8, router=returning(lambda report: report), **whole)
    layer(X, training=True)
    assert len(layer.losses) == 2
    bare = returning(lambda report: report.aux_loss)
    for options, missing in (
        (whole, r"\['confidence', 'z_loss'\]"),
        ({"z_loss_coef": 0.1}, r"\['z_loss'\]"),
        ({"router_metrics": ["confidence"]}, r"\['confidence'\]"),
    ):
        with pytest.raises(ValueError, match=f"balancing loss, and {missing}"):
            MoELayer(4, 8, router=bare, **options)(X, training=True)
    layer = MoELayer(4, 8, router=bare, router_metrics=["aux_loss"], aux_loss_coef=0.5)
    layer(X, training=True)
    [loss] = layer.losses
    counted = layer.health.result()[f"{layer.name}_aux_loss"]
    np.testing.assert_allclose(loss, 0.5 * counted, rtol=1e-6)

    class Alone(keras.layers.Layer):
        num_experts = 4

        def call(self, inputs, mask=None, training=None):
            return inputs

    with pytest.raises(ValueError, match="must return a tuple of a TokenChoiceRouting"):
        MoELayer(4, 8, router=Alone())(X)


def test_an_own_router_in_a_causal_decoder():
    router = returning(lambda report: RouterStats(*report))
    block = DecoderBlock(2, 4, 8, 4, moe_options={"router": router})
    assert block(X, X).shape == X.shape
    router.is_causal = False
    with pytest.raises(ValueError, match="must not depend on the tokens after it"):
        DecoderBlock(2, 4, 8, 4, moe_options={"router": router})
    router.allow_causal = True
    DecoderBlock(2, 4, 8, 4, moe_options={"router": router})


@pytest.mark.parametrize(
    "make",
    [
        lambda: Top2Router(4),
        lambda: TopKRouter(4, 1, scores="sigmoid", bias_update_rate=0.1),
    ],
)
def test_a_shared_router_is_still_shared_after_loading(make, tmp_path):
    router = make()
    model = model_with(router, router, make())
    model.run_eagerly = True
    model.fit(X, X[..., :1], verbose=0)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_allclose(loaded(X), model(X), rtol=1e-6)
    routers = [loaded.get_layer(f"moe_{i}").router for i in range(3)]
    assert routers[0] is routers[1] is not routers[2]
    assert len(loaded.weights) == len(model.weights)
    loaded.run_eagerly = True
    loaded.fit(X, X[..., :1], verbose=0)
    loaded.save(tmp_path / "again.keras")
    again = keras.saving.load_model(tmp_path / "again.keras")
    np.testing.assert_allclose(again(X), loaded(X), rtol=1e-6)
