"""Unmodified Keras on eight partitions: each thing compared with plain Keras."""

import gc
import weakref

import keras
import numpy as np
import parity
import pytest
import tensorflow as tf
from keras.src.random.seed_generator import draw_seed
from parity import assert_equal_runs

from gshard_tf.random.threefry import uniform

X, Y = parity.data(32)
WEIGHTS = np.linspace(0.1, 2.0, 32).astype("float32")
FIT = {"batch_size": 16, "epochs": 2, "verbose": 0, "shuffle": False}


def fit(model):
    return model.fit(X, Y, **FIT)


def sparse_loss():
    return keras.losses.SparseCategoricalCrossentropy(from_logits=True)


# -- kinds of models ---------------------------------------------------------------


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


# -- everything that fit, evaluate and predict take --------------------------------


def test_the_methods_of_a_model():
    def use(model):
        found = [
            model.fit(
                X,
                Y,
                sample_weight=WEIGHTS,
                validation_data=(X[:16], Y[:16], WEIGHTS[:16]),
                **FIT,
            ).history,
            model.fit(X, Y, class_weight={0: 1.0, 1: 0.5, 2: 3.0}, **FIT).history,
            model.fit(X, Y, validation_split=0.5, **FIT).history,
            model.evaluate(X, Y, batch_size=16, verbose=0),
            model.evaluate(X, Y, sample_weight=WEIGHTS, batch_size=16, verbose=0),
            model.predict(X, batch_size=16, verbose=0),
            model.predict(X[:13], batch_size=8, verbose=0),
            model.predict_on_batch(X[:16]),
            model.train_on_batch(X[:16], Y[:16]),
            model.train_on_batch(X[:16], Y[:16], sample_weight=WEIGHTS[:16]),
            model.test_on_batch(X[:16], Y[:16], return_dict=True),
            np.array(model(X[:5])),
        ]
        return found

    assert_equal_runs(lambda: parity.compiled(weighted_metrics=["accuracy"]), use)


def test_steps_per_execution():
    # Three steps an epoch, two an execution; the last batch is short.
    x, y = parity.data(36)

    def use(model):
        history = model.fit(x, y, **FIT, validation_data=(x, y)).history
        return history, model.predict(x, batch_size=16, verbose=0)

    assert_equal_runs(lambda: parity.compiled(steps_per_execution=2), use)


@pytest.mark.parametrize("by", ["model", "tensorflow"])
def test_run_eagerly(by):
    def make():
        return parity.compiled(run_eagerly=by == "model")

    def use(model):
        return fit(model).history, model.evaluate(X, Y), model.predict(X)

    tf.config.run_functions_eagerly(by == "tensorflow")
    try:
        plain = parity.run_plain(make, use)
        meshed = parity.run_on_mesh(make, use)
    finally:
        tf.config.run_functions_eagerly(False)
    parity.assert_close(meshed.result, plain.result, parity.RTOL, "results")
    parity.assert_same_state(meshed.model, plain.model)
    # Eager mode is for debugging: it runs on the host, operation by operation.
    assert meshed.strategy.programs == []


class Batches(keras.utils.PyDataset):
    def __len__(self):
        return 3

    def __getitem__(self, i):
        s = slice(16 * i, 16 * (i + 1))
        return self.x[s], self.y[s]

    def __init__(self):
        super().__init__()
        self.x, self.y = parity.data(36)


def generator():
    batches = Batches()
    for i in range(len(batches)):
        yield batches[i]


def endless():
    while True:
        yield from generator()


INPUTS = {
    "tf.data": lambda: {
        "x": tf.data.Dataset.from_tensor_slices(parity.data(36)).batch(16).prefetch(1)
    },
    "PyDataset": lambda: {"x": Batches()},
    "generator": lambda: {"x": endless(), "steps_per_epoch": 3},
    "tensors": lambda: dict(
        zip("xy", map(tf.constant, parity.data(36)), strict=True), batch_size=16
    ),
}


@pytest.mark.broad(2)
@pytest.mark.parametrize("kind", INPUTS)
def test_kinds_of_input(kind):
    def use(model):
        return model.fit(epochs=2, verbose=0, shuffle=False, **INPUTS[kind]()).history

    assert_equal_runs(parity.compiled, use)


def test_batches_of_many_lengths_compile_once_each():
    def batches():
        for n in (16, 3, 16, 5, 3):
            yield parity.data(n)

    def use(model):
        spec = (
            tf.TensorSpec([None, 8, 4], tf.float32),
            tf.TensorSpec([None], tf.int32),
        )
        dataset = tf.data.Dataset.from_generator(batches, output_signature=spec)
        # (At the end of a dataset, plain Keras counts a step that it did not make.)
        return model.fit(
            dataset.repeat(), epochs=2, steps_per_epoch=5, verbose=0
        ).history

    _, meshed = assert_equal_runs(parity.compiled, use)
    assert len(meshed.strategy.programs) == 3


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
        history = model.fit(x, y, validation_data=(x, y), **FIT).history
        return history, model.predict(x, batch_size=16, verbose=0)

    assert_equal_runs(make, use)


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


def test_masks():
    tokens = np.random.default_rng(0).integers(0, 5, size=[32, 8])

    def make():
        model = keras.Sequential(
            [
                keras.layers.Input([8], dtype="int32"),
                keras.layers.Embedding(5, 4, mask_zero=True),
                keras.layers.LSTM(4, return_sequences=True),
                keras.layers.Dense(3),
            ]
        )
        # Plain Keras's Adam squares each look-up of a row: see test_tables.py.
        optimizer = keras.optimizers.SGD(0.1, momentum=0.9)
        model.compile(optimizer, sparse_loss(), weighted_metrics=["accuracy"])
        return model

    def use(model):
        return model.fit(tokens, tokens % 3, **FIT).history

    assert_equal_runs(make, use)


def test_masking_layer_with_sample_weights():
    # Tokens of zeros, more of them in later examples.
    x = np.where(np.arange(8)[:, None] * 5 < np.arange(32)[:, None, None], 0.0, X)
    x[:, 7] = X[:, 7]

    def make():
        model = keras.Sequential(
            [
                keras.layers.Input([8, 4]),
                keras.layers.Masking(),
                keras.layers.Dense(3),
                keras.layers.GlobalAveragePooling1D(),
            ]
        )
        model.compile("adam", sparse_loss(), weighted_metrics=["accuracy"])
        return model

    assert_equal_runs(make, lambda m: m.fit(x, Y, sample_weight=WEIGHTS, **FIT).history)


def test_losses_and_metrics_of_layers():
    class Watched(parity.Experts):
        def build(self, shape):
            super().build(shape)
            self.size = keras.metrics.Mean("size")
            self.steps = self.add_weight(
                shape=(), initializer="zeros", trainable=False, name="steps"
            )

        def call(self, x, training=False):
            y = super().call(x, training=training)
            self.add_loss(0.1 * tf.reduce_mean(y**2))
            self.size.update_state(tf.norm(y))
            if training:
                self.steps.assign_add(1.0)
            return y

    def make():
        model = keras.Sequential(
            [
                Watched(),
                keras.layers.Flatten(),
                keras.layers.Dense(3, kernel_regularizer="l2"),
                keras.layers.ActivityRegularization(l2=0.01),
            ]
        )
        model.compile("adam", sparse_loss(), metrics=["accuracy"])
        return model

    def use(model):
        history = model.fit(X, Y, validation_data=(X, Y), **FIT).history
        assert "size" in history and float(model.layers[0].steps.numpy()) == 4
        return history

    assert_equal_runs(make, use)


def test_dropout_of_keras():
    # Compiled, TensorFlow's generator gives other numbers than operation by
    # operation, so the peer is compiled here. (On a mesh it makes the global mask on
    # each device; `gshard_tf.random` does not.)
    def make():
        model = parity.classifier()
        model.add(keras.layers.Dropout(0.5, seed=3))
        model.add(keras.layers.GaussianNoise(0.1, seed=4))
        model.compile("adam", sparse_loss())
        return model

    def use(model):
        if tf.distribute.get_strategy() is model.distribute_strategy:
            model.jit_compile = True
        return fit(model).history

    assert_equal_runs(make, use)


def test_random_numbers_without_a_seed_of_their_own():
    # Keras's global seed generator belongs to the thread that calls fit, and batches
    # of unknown length are traced in another.
    class Noise(keras.layers.Layer):
        def call(self, x, training=False):
            return x + uniform(draw_seed(None), [tf.shape(x)[0], x.shape[1]])

    def make():
        model = parity.classifier()
        model.add(Noise())
        model.compile("adam", sparse_loss())
        # In scope and in the main thread, as Keras makes it on first use.
        draw_seed(None)
        return model

    x, y = parity.data(36)
    assert_equal_runs(make, lambda model: model.fit(x, y, **FIT).history)


# -- optimizers and precision ------------------------------------------------------

OPTIMIZERS = {
    "schedule": lambda: keras.optimizers.Adam(
        keras.optimizers.schedules.CosineDecay(1e-2, 3)
    ),
    "clipnorm": lambda: keras.optimizers.Adam(1e-2, clipnorm=0.1),
    "global_clipnorm": lambda: keras.optimizers.SGD(0.1, global_clipnorm=0.1),
    "ema": lambda: keras.optimizers.SGD(0.1, use_ema=True, ema_momentum=0.5),
    "accumulation": lambda: keras.optimizers.Adam(1e-2, gradient_accumulation_steps=2),
    "RMSprop": lambda: keras.optimizers.RMSprop(1e-2, momentum=0.5, centered=True),
    "Nadam": lambda: keras.optimizers.Nadam(1e-2),
}


@pytest.mark.broad(3)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_options_of_optimizers(name):
    assert_equal_runs(lambda: parity.compiled(OPTIMIZERS[name]()), fit)


@pytest.mark.broad(2)
@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
def test_mixed_precision(policy):
    def make():
        model = keras.Sequential(
            [
                keras.layers.Input([8, 4]),
                parity.Experts(dtype=policy),
                keras.layers.Flatten(dtype=policy),
                keras.layers.Dense(3, dtype=policy),
                keras.layers.Activation("linear", dtype="float32"),
            ]
        )
        optimizer = keras.optimizers.Adam(1e-2)
        if policy == "mixed_float16":
            optimizer = keras.optimizers.LossScaleOptimizer(
                optimizer, initial_scale=8.0, dynamic_growth_steps=2
            )
        model.compile(optimizer, sparse_loss(), metrics=["accuracy"])
        return model

    def use(model):
        history = fit(model).history
        predicted = model.predict(X, batch_size=16, verbose=0)
        return history, predicted

    # 8 bits of mantissa, and another order of additions.
    _, meshed = assert_equal_runs(make, use, rtol=0.1)
    assert meshed.model.trainable_weights[0].dtype == "float32"
    if policy == "mixed_float16":
        assert float(meshed.model.optimizer.dynamic_scale) == 32.0


def test_loss_scale_shrinks_and_skips_the_step_on_overflow():
    def make():
        return parity.compiled(
            keras.optimizers.LossScaleOptimizer(
                keras.optimizers.Adam(1e-2), initial_scale=2.0**127
            )
        )

    def use(model):
        model.fit(X * 1e3, Y, **{**FIT, "epochs": 1})
        return float(model.optimizer.dynamic_scale)

    plain, _ = assert_equal_runs(make, use)
    assert plain.result < 2.0**127


# -- more than one fit -------------------------------------------------------------


def test_compile_again_and_fit_again():
    def use(model):
        first = fit(model).history
        scope = model.distribute_strategy.scope
        with scope():
            model.compile(
                keras.optimizers.SGD(0.1), sparse_loss(), metrics=["accuracy"]
            )
        if model.jit_compile:
            model.jit_compile = False
        second = fit(model).history
        model.layers[0].trainable = False
        with scope():
            model.compile("adam", sparse_loss())
        if model.jit_compile:
            model.jit_compile = False
        third = fit(model).history
        return first, second, third

    assert_equal_runs(parity.compiled, use)


def test_two_models_in_one_strategy_that_share_a_layer():
    class Two:
        """What `parity` compares; the second model trains the first one's experts."""

        def __init__(self):
            self.first = parity.compiled()
            shared = self.first.layers[0]
            self.second = keras.Sequential(
                [shared, keras.layers.GlobalAveragePooling1D(), keras.layers.Dense(1)]
            )
            self.second.compile("sgd", "mse")

        jit_compile = False
        variables = property(lambda s: s.first.variables + s.second.variables)
        metrics_variables = property(lambda s: s.first.metrics_variables)
        optimizer = property(lambda s: s.first.optimizer)

    def use(two):
        if not two.first.distribute_strategy.extended.__class__.__name__ == (
            "SpmdExtended"
        ):
            two.first.jit_compile = two.second.jit_compile = False
        found = []
        for _ in range(2):
            found.append(fit(two.first).history)
            found.append(two.second.fit(X, Y.astype("float32"), **FIT).history)
        return found

    assert_equal_runs(Two, use)


def test_fit_inside_the_scope():
    def use(model):
        with model.distribute_strategy.scope():
            return fit(model).history

    assert_equal_runs(parity.compiled, use)


def test_programs_and_models_are_freed():
    def use(model):
        fit(model)
        model.evaluate(X, Y, batch_size=16, verbose=0)
        model.predict(X, batch_size=16, verbose=0)

    run = parity.run_on_mesh(parity.compiled, use)
    model, strategy = weakref.ref(run.model), run.strategy
    assert len(strategy.programs) == 3
    del run
    keras.backend.clear_session()
    gc.collect()
    assert model() is None and strategy.programs == []
