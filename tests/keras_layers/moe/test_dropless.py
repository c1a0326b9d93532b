"""Dropless dispatch: as buffers that drop nothing, on one device and on many."""

import collections

import keras
import numpy as np
import processes
import pytest
import tensorflow as tf

import gshard_tf
from keras_layers import MoELayer, TopKRouter

B, L, M, H, E = 8, 6, 8, 12, 8
TOP2 = {"second_expert_policy": "all"}
ROUTERS = {
    "top2": TOP2,
    "top_k": {"kind": "top_k", "k": 3, "scores": "sigmoid"},
    "hash": {"kind": "hash"},
}


def _layer(dispatcher, router=TOP2, **options):
    keras.utils.set_random_seed(0)
    router = {**router, "capacity_factor": "dropless"}
    layer = MoELayer(E, H, router=router, dispatcher=dispatcher, seed=0, **options)
    layer.build((B, L, M))
    return layer


def _batch():
    rng = np.random.default_rng(0)
    x, target = rng.normal(size=(2, B, L, M)).astype("f")
    return x, target, rng.random((B, L)) < 0.8


def _results(layer, x, target, mask, training=True):
    """Outputs, losses, and the gradients of inputs and weights."""
    ids = tf.reshape(tf.range(B * L), [B, L]) * 7
    with tf.GradientTape() as tape:
        tape.watch(x)
        y = layer(x, mask=mask, training=training, token_ids=ids)
        loss = tf.reduce_sum(tf.cast(y, tf.float32) * target) + sum(layer.losses)
    weights = [weight.value for weight in layer.trainable_variables]
    return [y, loss, *tape.gradient(loss, [x, *weights])]


def _assert_close(results, expected, tolerance=1e-5):
    for result, right in zip(results, expected, strict=True):
        right = np.asarray(right)
        scale = max(1.0, np.abs(right).max())
        np.testing.assert_allclose(result, right, rtol=0, atol=tolerance * scale)


@pytest.mark.broad(3)
@pytest.mark.parametrize("router", ROUTERS)
def test_equals_buffers_that_drop_nothing(router):
    options = {"activation": "silu", "gated": True, "num_shared_experts": 1}
    x, target, mask = _batch()
    x[~mask] = np.nan
    expected, results = (
        use(_layer(kind, ROUTERS[router], **options), tf.constant(x), target, mask)
        for kind, use in (
            ("index", _results),
            ("dropless", tf.function(_results, autograph=False, jit_compile=True)),
        )
    )
    _assert_close(results, expected)


def test_unknown_sizes_and_saved_models(tmp_path):
    inputs = keras.Input((None, M))
    layer = _layer("dropless")
    model = keras.Model(inputs, layer(inputs))
    x, _, _ = _batch()
    expected = _layer("index")(tf.constant(x))
    outputs = model.predict(x, verbose=0)
    np.testing.assert_allclose(outputs, expected, atol=1e-5)
    model.export(tmp_path / "saved", verbose=False)
    served = tf.saved_model.load(tmp_path / "saved")
    for rows, length in ((3, L), (1, 2)):
        outputs = served.serve(tf.constant(x[:rows, :length]))
        np.testing.assert_allclose(outputs, expected[:rows, :length], atol=1e-5)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_allclose(loaded(x), expected, atol=1e-5)


def test_decoding_and_bfloat16():
    x, target, mask = _batch()
    layer = _layer("dropless", dtype="mixed_bfloat16")
    results = _results(layer, tf.constant(x), target, mask)
    outputs = results[0]
    assert outputs.dtype == "bfloat16"
    tokens = layer(x, mask=mask, decoding=True)
    np.testing.assert_allclose(*(tf.cast(y, "float32") for y in (tokens, outputs)))
    expected = _results(_layer("index"), tf.constant(x), target, mask)
    _assert_close([tf.cast(r, tf.float32) for r in results], expected, 0.1)


MESHES = {
    "experts and widths": ({"data": 2, "model": 2}, None),
    "data": ({"data": 2}, {"batch": "data", "group": "data"}),
    "two axes": (
        {"data": 2, "x": 2},
        {"batch": "data", "group": "data", "expert": "x"},
    ),
    "experts": ({"expert": 4}, None),
    "outer groups": (
        {"data": 2, "x": 2, "y": 2},
        {"batch": ("data", "x"), "group": ("data", "x"), "expert": "x", "mlp": "y"},
    ),
    "joined": (
        {"x": 2, "y": 2},
        {"batch": ("x", "y"), "group": ("x", "y"), "expert": ("y", "x")},
    ),
}


def _descend(layer, x, target, mask):
    """The outputs, the loss and the inputs' gradient; weights take a step."""
    *results, d_router, d_wi, d_wo = _results(layer, x, target, mask)
    for weight, gradient in zip(
        layer.trainable_variables, (d_router, d_wi, d_wo), strict=True
    ):
        weight.assign_sub(gradient)
    return results


# As many choices as elsewhere here, so that regions are exported once.
DROPS_UNITS = {"dropout": 0.3, "router": ROUTERS["top_k"] | {"k": 2}}


@pytest.fixture(scope="module")
def descended():
    """A layer on one device after a step, and what `_descend` returned."""
    x, target, mask = _batch()
    layer = _layer("dropless", **DROPS_UNITS)
    return layer, _descend(layer, tf.constant(x), target, mask)


@pytest.mark.broad(6)  # besides, two tests below run on a mesh of experts
@pytest.mark.parametrize("name", MESHES)
def test_on_a_mesh(descended, name):
    """Dropout included, whose masks stay with the tokens."""
    x, target, mask = _batch()
    layer, expected = descended
    axes, rules = MESHES[name]
    rules = None if rules is None else gshard_tf.AxisRules(rules)
    strategy = gshard_tf.SpmdStrategy(gshard_tf.create_mesh(axes), rules)
    with strategy.scope():
        split = _layer("dropless", **DROPS_UNITS)

        @tf.function(autograph=False)
        def step(x, target, mask):
            return _descend(split, x, target, mask)

        results = strategy.run(step, (x, target, mask))
    _assert_close(results, expected)
    _assert_close(split.get_weights(), layer.get_weights())
    sent = strategy.programs[-1].collectives()
    kinds = collections.Counter(each.kind for each in sent)
    # Sizes; then rows, results, the gradients of the two, and the choices, for dropout:
    # a round each, and the loop of further ones.
    assert kinds["all-to-all"] == (0 if name == "data" else 1 + 2 * 5)
    gathered = [each.bytes for each in sent if each.kind == "all-gather"]
    if name == "two axes":
        # Tokens of `group` are whole along the experts' axis: their outputs and their
        # gradient are gathered along it, and neither choices nor weights.
        assert max(gathered) == x.nbytes // 2
    else:
        assert not gathered  # neither a weight nor tokens


@pytest.mark.parametrize("decoding", [False, True])
def test_tokens_that_do_not_divide(decoding):
    x = _batch()[0][:3]  # 18 tokens for 4 devices
    expected = _layer("index")(tf.constant(x))
    strategy = gshard_tf.SpmdStrategy(gshard_tf.create_mesh({"expert": 4}))
    with strategy.scope():
        layer = _layer("dropless")
        step = tf.function(lambda x: layer(x, decoding=decoding), autograph=False)
        outputs = strategy.run(step, (x,))
    np.testing.assert_allclose(outputs, expected, atol=1e-5)


def test_one_token(tmp_path):
    """In TensorFlow, in a SavedModel, and on a mesh, where no weight is moved."""
    x = _batch()[0][:1, :1]
    expected = _layer("index")(x, decoding=True)
    layer = _layer("dropless")
    module = tf.Module()
    module.layer = layer
    module.decode = tf.function(
        lambda x: layer(x, decoding=True),
        input_signature=[tf.TensorSpec([1, 1, M])],
        autograph=False,
    )
    tf.saved_model.save(module, str(tmp_path))
    served = tf.saved_model.load(str(tmp_path))
    for decode in (module.decode, served.decode):
        np.testing.assert_allclose(decode(tf.constant(x)), expected, atol=1e-5)
    strategy = gshard_tf.SpmdStrategy(gshard_tf.create_mesh({"expert": 4}))
    with strategy.scope():
        split = _layer("dropless")
        step = tf.function(lambda x: split(x, decoding=True), autograph=False)
        outputs = strategy.run(step, (x,))
    np.testing.assert_allclose(outputs, expected, atol=1e-5)
    for sent in strategy.programs[-1].collectives():
        # As many numbers as n*K rows have, at most: fewer than a matrix of an expert.
        assert sent.bytes <= 4 * (4 * 2 * M) < 4 * (M * H), sent


COMPILE_FOR_TPU = """
import keras
import tensorflow as tf

import gshard_tf


class Experts(keras.layers.Layer):
    def build(self, shape):
        self.kernel = self.add_weight(shape=(8, 4, 4))
        gshard_tf.name_axes(self.kernel, ("expert", "embed", "mlp"))

    def call(self, x):
        x = gshard_tf.annotate(x, ("group", None))
        dispatch = gshard_tf.RaggedDispatch(tf.cast(x[:, :2], "int32"), 8)
        rows = dispatch.dot(dispatch.rows(x), self.kernel, ("expert", "embed", "mlp"))
        return dispatch.combine(rows)


def build():
    model = keras.Sequential([keras.Input((4,)), Experts()])
    model.compile("sgd", "mse")
    return model


batch = tf.TensorSpec((16, 4), "float32")
print(gshard_tf.plan(build, "v5e:2x2", batch=batch, mode="predict", cache=False).fits)
"""


@pytest.mark.slow  # 20 s in a compiler that other tests call
def test_several_experts_on_a_device_compile_for_a_tpu():
    """XLA stops the process at a sort of two arrays, which a stable one becomes."""
    assert processes.run_python(COMPILE_FOR_TPU).endswith("True\n")


def test_what_does_not_fit():
    with pytest.raises(ValueError, match='must have a capacity_factor of "dropless"'):
        MoELayer(E, H, router=TopKRouter(E), dispatcher="dropless")
    with pytest.raises(ValueError, match="must let tokens choose experts"):
        MoELayer(E, H, router="expert_choice", dispatcher="dropless")
    assert MoELayer(E, H, dispatcher="dropless").router.capacity_factor == "dropless"
    strategy = gshard_tf.SpmdStrategy(gshard_tf.create_mesh({"expert": 3}))
    with strategy.scope():
        layer = _layer("dropless")
        with pytest.raises(ValueError, match=rf"must divide.*num_experts={E}, 3 dev"):
            strategy.run(tf.function(lambda x: layer(x)), (_batch()[0],))
