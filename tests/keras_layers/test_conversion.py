"""Trained models frozen and converted to LiteRT give the model's answers."""

import keras
import numpy as np
import pytest
import tensorflow as tf

# Not in TensorFlow's public API: what TensorFlow's documentation of freezing calls.
from tensorflow.python.framework.convert_to_constants import (
    convert_variables_to_constants_v2,
)

from keras_layers import MoELayer, Transformer

X = np.random.default_rng(0).normal(size=(8, 6, 4)).astype("float32")
IDS = np.random.default_rng(0).integers(3, 12, (8, 6)).astype("int32")


def mixture(router=None):
    inputs = keras.Input([6, 4])
    moe = MoELayer(4, 8, router=router, num_shared_experts=1, gated=True)
    model = keras.Model(inputs, keras.layers.Dense(1)(moe(inputs)))
    model.compile("sgd", "mse", run_eagerly=True)
    return model


def transformer(**arguments):
    sizes = [12, 12, 1, 1, 8, 16, 2]
    model = Transformer(*sizes, num_experts=4, moe_every=1, **arguments)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile("sgd", loss, run_eagerly=True)
    return model


KINDS = {
    "mixture": (mixture, [X], X[..., :1]),
    "top_k": (lambda: mixture({"kind": "top_k", "k": 1}), [X], X[..., :1]),
    "choice": (lambda: mixture("expert_choice"), [X], X[..., :1]),
    "transformer": (transformer, [IDS, IDS], IDS),
    "stacked": (lambda: transformer(stacked=True), [IDS, IDS], IDS),
}
QUICK = ["mixture"]
SLOW = [pytest.param(k, marks=pytest.mark.slow) for k in KINDS if k not in QUICK]


@pytest.fixture(scope="module", params=[*QUICK, *SLOW])
def trained(request):
    """A model after training, its inputs, its answers, and a frozen graph of it."""
    make, inputs, labels = KINDS[request.param]
    model = make()
    packed = inputs[0] if len(inputs) == 1 else tuple(inputs)
    model.fit(packed, labels, verbose=0)
    answers = model.predict(packed, verbose=0)

    @tf.function
    def forward(*inputs):
        return model(inputs[0] if len(inputs) == 1 else inputs, training=False)

    specs = [tf.TensorSpec(x.shape, x.dtype) for x in inputs]
    frozen = convert_variables_to_constants_v2(forward.get_concrete_function(*specs))
    return model, inputs, answers, frozen


def run_lite(content, inputs):
    interpreter = tf.lite.Interpreter(model_content=content)
    details = sorted(interpreter.get_input_details(), key=lambda d: d["name"])
    for detail, x in zip(details, inputs, strict=True):
        interpreter.resize_tensor_input(detail["index"], x.shape)
    interpreter.allocate_tensors()
    for detail, x in zip(details, inputs, strict=True):
        interpreter.set_tensor(detail["index"], x)
    interpreter.invoke()
    return interpreter.get_tensor(interpreter.get_output_details()[0]["index"])


def test_frozen(trained):
    _, inputs, answers, frozen = trained
    assert not [op for op in frozen.graph.get_operations() if "Variable" in op.type]
    found = frozen(*(tf.constant(x) for x in inputs))
    found = found[0] if isinstance(found, list) else found
    np.testing.assert_allclose(found, answers, rtol=1e-5, atol=1e-5)


def test_converted_from_a_frozen_function(trained):
    _, inputs, answers, frozen = trained
    content = tf.lite.TFLiteConverter.from_concrete_functions([frozen]).convert()
    np.testing.assert_allclose(run_lite(content, inputs), answers, rtol=1e-5, atol=1e-5)


def test_converted_from_an_exported_model(trained, tmp_path):
    model, inputs, answers, _ = trained
    model.export(tmp_path / "saved", verbose=False)
    converter = tf.lite.TFLiteConverter.from_saved_model(str(tmp_path / "saved"))
    content = converter.convert()
    np.testing.assert_allclose(run_lite(content, inputs), answers, rtol=1e-5, atol=1e-5)
