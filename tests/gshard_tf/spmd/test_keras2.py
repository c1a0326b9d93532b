"""Models of Keras 2 (`tf_keras`) under a strategy, beside plain `tf_keras`."""

import contextlib

import numpy as np
import parity
import pytest
import tensorflow as tf

import gshard_tf

tf_keras = pytest.importorskip("tf_keras")
K = tf_keras.optimizers

IDS = np.random.default_rng(0).integers(0, 12, size=[24, 4]).astype("int32")
TARGETS = (IDS[:, :1] * 0.1).astype("float32")

# But for Nadam, which counts in Python how often it was traced, and computes with that.
OPTIMIZERS = {
    "SGD": lambda: K.SGD(0.05, momentum=0.9),
    "RMSprop": lambda: K.RMSprop(1e-2),
    "Adam": lambda: K.Adam(1e-2),
    "AdamW": lambda: K.AdamW(1e-2),
    "Adadelta": lambda: K.Adadelta(1.0),
    "Adagrad": lambda: K.Adagrad(1e-1),
    "Adamax": lambda: K.Adamax(1e-2),
    "Adafactor": lambda: K.Adafactor(1e-2),
    "Ftrl": lambda: K.Ftrl(1e-1),
    "Lion": lambda: K.Lion(1e-3),
    "legacy Adam": lambda: K.legacy.Adam(1e-2),
}
RULES = gshard_tf.AxisRules(
    {"batch": "data", "mlp": "model", "vocab": "model"},
    paths=[(r".*/embeddings", ("vocab", None)), (r".*hidden/kernel", (None, "mlp"))],
)


def classifier(optimizer):
    model = tf_keras.Sequential(
        [
            tf_keras.layers.Input([4], dtype="int32"),
            tf_keras.layers.Embedding(16, 8, name="embedding"),
            tf_keras.layers.Flatten(),
            tf_keras.layers.Dense(16, "relu", name="hidden"),
            tf_keras.layers.Dense(1, name="head"),
        ]
    )
    model.compile(OPTIMIZERS[optimizer](), "mse", metrics=["mae"])
    return model


def fitted(make, strategy, *data):
    tf_keras.backend.clear_session()
    tf_keras.utils.set_random_seed(7)
    with strategy.scope() if strategy else contextlib.nullcontext():
        model = make()
    history = model.fit(*data, batch_size=8, epochs=2, shuffle=False, verbose=0)
    return model, history.history


def optimizer_state(model):
    variables = model.optimizer.variables
    return [v.numpy() for v in (variables() if callable(variables) else variables)]


QUICK = ("Adam", "Adagrad", "legacy Adam")


@pytest.mark.parametrize(
    "optimizer",
    [
        name if name in QUICK else pytest.param(name, marks=pytest.mark.slow)
        for name in OPTIMIZERS
    ],
)
def test_a_model_trains_as_in_plain_keras_2(optimizer):
    plain, expected = fitted(lambda: classifier(optimizer), None, IDS, TARGETS)
    strategy = parity.strategy_of({"data": 2, "model": 2}, rules=RULES)
    model, found = fitted(lambda: classifier(optimizer), strategy, IDS, TARGETS)
    parity.assert_close(found, expected, parity.RTOL, "history")
    parity.assert_close(
        model.get_weights(), plain.get_weights(), parity.RTOL, "weights"
    )
    parity.assert_close(
        optimizer_state(model), optimizer_state(plain), parity.RTOL, "slots"
    )
    assert strategy.programs, "nothing ran on the mesh"


@pytest.mark.broad(2)
@pytest.mark.parametrize("optimizer", ["Adafactor", "Adam", "legacy Adam"])
def test_path_rules_match_weights_and_slots_follow(optimizer):
    strategy = parity.strategy_of({"data": 2, "model": 2}, rules=RULES)
    model, _ = fitted(lambda: classifier(optimizer), strategy, IDS, TARGETS)
    description = strategy.describe(model)
    found = {row.path: row.layout for row in description.rows}
    assert found["embedding/embeddings"] == ("model", None)
    assert found["hidden/kernel"] == (None, "model")
    assert found["head/kernel"] == (None, None)
    if optimizer == "Adam":
        assert found["Adam/m/embedding/embeddings"] == ("model", None)
        assert found["Adam/v/hidden/kernel"] == (None, "model")
    elif optimizer == "legacy Adam":
        assert found["Adam/embedding/embeddings/m"] == ("model", None)
        assert found["Adam/hidden/kernel/v"] == (None, "model")
    else:
        assert found["Adafactor/r/embedding/embeddings"] == ("model",)
        assert found["Adafactor/c/embedding/embeddings"] == (None,)
        assert found["Adafactor/r/hidden/kernel"] == (None,)
        assert found["Adafactor/c/hidden/kernel"] == ("model",)
        assert found["Adafactor/v/hidden/kernel"] == (None, "model")
    assert not description.warnings


def attending():
    inputs = tf_keras.layers.Input([4, 8])
    attention = tf_keras.layers.MultiHeadAttention(2, 4, name="self_attention")
    outputs = tf_keras.layers.Dense(8, name="output")(attention(inputs, inputs))
    model = tf_keras.Model(inputs, outputs)
    model.compile("sgd", "mse")
    return model


def test_a_pattern_that_matches_a_weight_of_another_rank_says_what_would_be_right():
    """`.*output.*` is meant for `output/kernel`, and is `attention_output/kernel`."""
    rows = np.zeros([8, 4, 8], "float32")

    def strategy(pattern):
        rules = gshard_tf.AxisRules(
            {"batch": "data", "mlp": "model"}, paths=[(pattern, ("mlp", None))]
        )
        return parity.strategy_of({"data": 2, "model": 2}, rules=rules)

    # Raised where the variables are made, or within TensorFlow's graph of the step.
    with pytest.raises((ValueError, tf.errors.InvalidArgumentError)) as refused:
        fitted(attending, strategy(".*output.*/kernel"), rows, rows)
    for part in (
        "'.*output.*/kernel' names 2 dimensions",
        "the weight 'self_attention/attention_output/kernel' of shape (2, 4, 8)",
        "for each of its 3 dimensions, or a pattern that does not match it",
        "Received: paths=[('.*output.*/kernel', ('mlp', None))]",
    ):
        assert part in str(refused.value)
    # What the sentence says would be right, is.
    right = strategy("(.*/)?output/kernel")
    model, _ = fitted(attending, right, rows, rows)
    found = {row.path: row.layout for row in right.describe(model).rows}
    assert found["output/kernel"] == ("model", None)
    assert set(found["self_attention/attention_output/kernel"]) == {None}


def test_the_value_on_the_mesh_is_read_by_keras_2():
    strategy = parity.strategy_of({"data": 2, "model": 2}, rules=RULES)
    model, _ = fitted(lambda: classifier("Adam"), strategy, IDS, TARGETS)
    weights = model.get_weights()
    predicted = model.predict(IDS, verbose=0)
    twin = classifier("Adam")
    twin.set_weights(weights)
    np.testing.assert_allclose(predicted, twin(tf.constant(IDS)), rtol=1e-4, atol=1e-5)
