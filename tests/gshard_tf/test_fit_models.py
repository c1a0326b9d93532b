"""Kinds of models on eight partitions, each compared with plain Keras."""

import keras
import numpy as np
import parity
import pytest
import tensorflow as tf
from parity import assert_equal_runs

X, Y = parity.data(32)
FIT = {"batch_size": 16, "epochs": 2, "verbose": 0, "shuffle": False}


def fit(model):
    return model.fit(X, Y, **FIT)


def sparse_loss():
    return keras.losses.SparseCategoricalCrossentropy(from_logits=True)


class Subclassed(keras.Model):
    def __init__(self):
        super().__init__()
        self.experts = parity.Experts()
        self.flatten = keras.layers.Flatten()
        self.dense = keras.layers.Dense(3)

    def call(self, x, training=False):
        return self.dense(self.flatten(self.experts(x, training=training)))


class OwnTrainStep(Subclassed):
    """Two optimizers, used by the step itself, and a return value of its own."""

    def __init__(self):
        super().__init__()
        self.expert_optimizer = keras.optimizers.SGD(0.05, momentum=0.9)
        self.other_optimizer = keras.optimizers.Adam()
        self.mean = keras.metrics.Mean("mean")

    def train_step(self, data):
        x, y = data
        with tf.GradientTape() as tape:
            logits = self(x, training=True)
            loss = tf.reduce_mean(sparse_loss()(y, logits))
        variables = self.experts.trainable_weights
        rest = self.dense.trainable_weights
        gradients = tape.gradient(loss, variables + rest)
        self.expert_optimizer.apply(gradients[: len(variables)], variables)
        self.other_optimizer.apply(gradients[len(variables) :], rest)
        self.mean.update_state(loss)
        return {"loss": loss, "mean": self.mean.result(), "two": 2.0}

    @property
    def metrics(self):
        return [self.mean]


def functional():
    inputs = keras.Input([8, 4])
    hidden = parity.Experts()(inputs)
    hidden = keras.layers.BatchNormalization()(keras.layers.Flatten()(hidden))
    return keras.Model(inputs, keras.layers.Dense(3)(hidden))


@pytest.mark.broad(2)
@pytest.mark.parametrize("kind", [functional, Subclassed])
def test_kinds_of_models(kind):
    def make():
        model = kind()
        model.compile("adam", sparse_loss(), metrics=["accuracy"])
        return model

    def use(model):
        history = fit(model)
        return history.history, model.predict(X, batch_size=16, verbose=0)

    assert_equal_runs(make, use)


def test_a_train_step_of_ones_own():
    def make():
        model = OwnTrainStep()
        model.compile(optimizer=None)
        return model

    def use(model):
        history = fit(model).history
        slots = model.expert_optimizer.variables + model.other_optimizer.variables
        return history, [slot.numpy() for slot in slots]

    _, meshed = assert_equal_runs(make, use)
    assert meshed.result[0]["two"] == [2.0, 2.0]
    [momentum, _] = meshed.model.expert_optimizer.variables[2:]
    assert meshed.strategy.layout(momentum).sharding_specs[0] == "expert"


def test_any_output_of_a_step():
    class Outputs(Subclassed):
        def predict_step(self, data):
            y = self(data)
            return {
                "logits": y,
                "same": y,
                "input": data,
                "constant": tf.ones([16, 2]),
                "half": tf.cast(y, tf.bfloat16),
                "int": (tf.argmax(y, -1), y > 0),
                "uneven": tf.reduce_sum(y, 0),
            }

    def use(model):
        found = model.predict(X, batch_size=16, verbose=0)
        assert found["half"].dtype == tf.bfloat16.as_numpy_dtype
        assert found["int"][1].dtype == bool
        return {**found, "half": found["half"].astype("float32")}

    assert_equal_runs(Outputs, use, rtol=5e-3)


def test_logs_that_are_no_tensors():
    class Logs(Subclassed):
        def train_step(self, data):
            logs = super().train_step(data)
            return {**logs, "text": "abc", "none": None, "nested": {"three": 3}}

        def test_step(self, data):
            return {**super().test_step(data), "text": "abc", "numpy": np.float32(2)}

    def make():
        model = Logs()
        model.compile("adam", sparse_loss())
        return model

    def use(model):
        evaluated = model.evaluate(X, Y, batch_size=16, verbose=0, return_dict=True)
        found = [fit(model).history, evaluated]
        # (Keras makes an array of a string.)
        texts = [found[0].pop("text"), found[1].pop("text")]
        return found, [str(text) for text in texts]

    plain, meshed = assert_equal_runs(make, use)
    assert plain.result[0][0]["three"] == [3.0, 3.0]
    assert meshed.strategy.programs


def test_no_labels_at_all():
    class Autoencoder(keras.Model):
        def __init__(self):
            super().__init__()
            self.experts = parity.Experts()

        def call(self, x):
            y = self.experts(x)
            self.add_loss(tf.reduce_mean((y - 1.0) ** 2))
            return y

    def make():
        model = Autoencoder()
        model.compile("adam")
        return model

    assert_equal_runs(make, lambda model: model.fit(X, **FIT).history)


def test_dict_inputs_multiple_outputs_and_none_labels():
    def make():
        inputs = {"a": keras.Input([8, 4]), "b": keras.Input([4])}
        hidden = keras.layers.Flatten()(parity.Experts()(inputs["a"]))
        hidden = keras.layers.Concatenate()([hidden, inputs["b"]])
        outputs = {
            "class": keras.layers.Dense(3, name="class")(hidden),
            "value": keras.layers.Dense(1, name="value")(hidden),
        }
        model = keras.Model(inputs, outputs)
        model.compile(
            "adam",
            {"class": sparse_loss(), "value": "mse"},
            metrics={"class": ["accuracy"], "value": ["mae"]},
            loss_weights={"class": 1.0, "value": 0.5},
        )
        return model

    x = {"a": X, "b": X[:, 0]}
    y = {"class": Y, "value": X[:, 0, :1]}

    def use(model):
        history = model.fit(x, y, **FIT).history
        return history, model.predict(x, batch_size=16, verbose=0)

    assert_equal_runs(make, use)
