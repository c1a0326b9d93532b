"""`verify` and `VerifyFirstStep`: what is equal is found equal and stays as it was."""

import keras
import numpy as np
import parity
import pytest
import tensorflow as tf
from planted import X, Y, assert_same_bits, on_mesh, sparse_loss, state, three_layers

import gshard_tf
import keras_layers
from gshard_tf.callbacks import verify_first_step
from gshard_tf.runtime.process_group import ProcessGroup
from gshard_tf.verification import comparison, references, tolerances
from gshard_tf.verification import verify as verify_module


def with_everything():
    """Embedding, experts, dropout of both kinds, statistics, a seed and a metric."""
    ids = keras.Input([8, 4])
    whole = keras.ops.cast(ids[..., 0] * 5 + 5, "int32") % 11
    x = keras.layers.Embedding(11, 6)(whole)
    x = parity.Experts(dropout=0.2)(x)
    x = keras.layers.BatchNormalization()(keras.layers.Dropout(0.2)(x))
    x = keras.layers.Dense(3)(keras.layers.Flatten()(x))
    model = keras.Model(ids, x)
    model.compile("adam", sparse_loss(), metrics=["accuracy"])
    return model


def routed():
    inputs = keras.Input([8, 4])
    router = keras_layers.Top2Router(4)
    x = keras_layers.MoELayer(num_experts=4, hidden_dim=8, router=router)(inputs)
    model = keras.Model(inputs, keras.layers.Dense(3)(keras.layers.Flatten()(x)))
    model.compile("adam", sparse_loss())
    return model


def half():
    layers = [
        keras.layers.Input([8, 4]),
        keras.layers.Flatten(),
        keras.layers.Dense(16, "relu"),
        keras.layers.LayerNormalization(),
        keras.layers.Dense(3, dtype="float32"),
    ]
    for layer in layers[2:4]:
        layer.dtype_policy = keras.DTypePolicy("mixed_bfloat16")
    model = keras.Sequential(layers)
    model.compile(keras.optimizers.SGD(0.1, momentum=0.9), sparse_loss())
    return model


class TwoOptimizers(keras.Model):
    def __init__(self):
        super().__init__()
        self.flatten = keras.layers.Flatten()
        self.first = keras.layers.Dense(5, "tanh")
        self.second = keras.layers.Dense(3)
        self.slow = keras.optimizers.SGD(0.05, momentum=0.9)
        self.fast = keras.optimizers.Adam()

    def call(self, x):
        return self.second(self.first(self.flatten(x)))

    def train_step(self, data):
        x, y = data
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(sparse_loss()(y, self(x, training=True)))
        weights = [*self.first.trainable_weights, *self.second.trainable_weights]
        gradients = tape.gradient(loss, weights)
        self.slow.apply(gradients[:2], weights[:2])
        self.fast.apply(gradients[2:], weights[2:])
        return {"loss": loss}


def two_optimizers():
    model = TwoOptimizers()
    model.compile(optimizer=None)
    return model


@pytest.mark.broad(4)
@pytest.mark.parametrize("make", [with_everything, routed, half, two_optimizers])
def test_what_is_equal_stays_as_it_was(make):
    def fit(model):
        return model.fit(X, Y, batch_size=8, epochs=1, verbose=0, shuffle=False).history

    expected = on_mesh(make)
    history = fit(expected), fit(expected)
    model = on_mesh(make)
    first = fit(model)
    before = state(model)
    programs = list(model.distribute_strategy.programs)
    report = gshard_tf.verify(model, (X[:8], Y[:8]))
    assert report.ok, str(report)
    assert report.check() is report
    assert {row.reference for row in report.rows} == {"one device", "TensorFlow"}
    assert_same_bits(state(model), before)
    assert model.distribute_strategy.programs == programs
    # And training goes on as if nothing had been.
    assert (first, fit(model)) == history
    assert_same_bits(state(model), state(expected))


@pytest.mark.slow
def test_one_that_is_not_built_is_built_as_fit_builds_it():
    def make():
        model = keras.Sequential(
            [keras.layers.Flatten(), keras.layers.Dropout(0.2), keras.layers.Dense(3)]
        )
        model.compile("adam", sparse_loss(), metrics=["accuracy"])
        return model

    expected = on_mesh(make)
    expected.fit(X, Y, batch_size=8, verbose=0, shuffle=False)
    model = on_mesh(make)
    assert gshard_tf.verify(model, (X[:8].astype("float64"), Y[:8])).ok
    model.fit(X, Y, batch_size=8, verbose=0, shuffle=False)
    assert_same_bits(state(model), state(expected))


def test_what_is_nothing_but_rounding_is_no_difference(monkeypatch):
    def make():
        model = keras.Sequential(
            [
                keras.layers.Input([8, 4]),
                keras.layers.Flatten(),
                # The normalisation takes the bias out again: its gradient is 0.
                keras.layers.Dense(6, name="below"),
                keras.layers.BatchNormalization(),
                keras.layers.Dense(3),
            ]
        )
        model.compile("adam", sparse_loss())
        return model

    model = on_mesh(make)
    report = gshard_tf.verify(model, (X, Y))
    assert report.ok, str(report)
    assert any("Rounding" in note and "below/bias" in note for note in report.notes)
    monkeypatch.setattr(tolerances, "_PERTURBATIONS", 0)
    report = gshard_tf.verify(model, (X, Y))
    assert {row.name for row in report.differing} >= {
        "sequential/below/bias",
        "adam/sequential_below_bias_momentum",
    }


@pytest.mark.parametrize("mode", ["evaluate", "predict"])
def test_other_steps(mode):
    model = on_mesh(three_layers)
    report = gshard_tf.verify(model, (X, Y, np.ones(16, "float32")), mode)
    assert report.ok, str(report)
    kinds = {row.kind for row in report.rows}
    assert kinds == ({"output", "metric"} if mode == "evaluate" else {"output"})


def test_the_first_step_of_fit_is_verified():
    def fit(model, *callbacks):
        # Three steps; the last batch is short. And validation has other steps.
        return model.fit(
            *parity.data(20),
            batch_size=8,
            epochs=2,
            verbose=0,
            shuffle=False,
            validation_data=(X, Y),
            callbacks=list(callbacks),
        ).history

    expected = on_mesh(three_layers)
    history = fit(expected)
    model = on_mesh(three_layers)
    verifying = gshard_tf.VerifyFirstStep()
    assert verifying.report is None
    assert fit(model, verifying) == history
    assert verifying.report.ok
    assert verifying.report.title.startswith("train step")
    assert_same_bits(state(model), state(expected))
    assert model.distribute_strategy.extended.before_step is None


def test_one_thread_is_refused_before_training(monkeypatch):
    """The check would wait for ever for the thread that waits for it."""
    monkeypatch.setattr(verify_first_step, "has_two_threads", lambda: False)
    model = on_mesh(three_layers)
    with pytest.raises(RuntimeError, match="TF_NUM_INTEROP_THREADS=2"):
        model.fit(X, Y, verbose=0, callbacks=[gshard_tf.VerifyFirstStep()])


def test_one_of_the_steps_of_an_execution_is_verified():
    class Counting(gshard_tf.VerifyFirstStep):
        checks = 0

        def _check(self, *arguments):
            self.checks += 1
            super()._check(*arguments)

    model = on_mesh(three_layers)
    with model.distribute_strategy.scope():
        model.compile("sgd", sparse_loss(), steps_per_execution=2)
    counting = Counting()
    model.fit(*parity.data(16), batch_size=8, verbose=0, callbacks=[counting])
    assert counting.checks == 1


def test_what_is_refused(monkeypatch):
    model = on_mesh(three_layers)
    with pytest.raises(ValueError, match="`mode` must be one of"):
        gshard_tf.verify(model, (X, Y), "fit")
    with pytest.raises(ValueError, match="`tolerance` must be at least 0.*-1"):
        gshard_tf.verify(model, (X, Y), tolerance=-1)
    with pytest.raises(ValueError, match="`batch` must be of arrays.*TensorSpec"):
        gshard_tf.verify(model, tf.TensorSpec([8, 8, 4], tf.float32))
    keras.backend.clear_session(free_memory=False)
    plain = three_layers()
    with pytest.raises(ValueError, match="SpmdStrategy.*Received"):
        gshard_tf.verify(plain, (X, Y))
    with pytest.raises(ValueError, match="SpmdStrategy.*Received"):
        plain.fit(X, Y, verbose=0, callbacks=[gshard_tf.VerifyFirstStep()])
    with pytest.raises(ValueError, match="`tolerance` must be at least 0"):
        gshard_tf.VerifyFirstStep(tolerance=float("nan"))
    monkeypatch.setattr(verify_module, "group", lambda: ProcessGroup(count=2))
    with pytest.raises(ValueError, match="2 processes"):
        gshard_tf.verify(model, (X, Y))


def test_an_error_on_the_way_changes_nothing(monkeypatch):
    model = on_mesh(three_layers)
    model.fit(X, Y, batch_size=8, verbose=0)
    before = state(model)

    def fail(*_):
        raise MemoryError("no room")

    monkeypatch.setattr(references.OnDevices, "compile", fail)
    with pytest.raises(MemoryError):
        gshard_tf.verify(model, (X, Y))
    assert_same_bits(state(model), before)


def test_without_room_on_one_device_tensorflow_is_left(monkeypatch):
    whole = comparison.on_one_device

    def no_room(*args):
        one = whole(*args)

        def fail(_):
            raise RuntimeError("RESOURCE_EXHAUSTED: no room\nand more")

        monkeypatch.setattr(one, "compile", fail)
        return one

    monkeypatch.setattr(comparison, "on_one_device", no_room)
    model = on_mesh(three_layers)
    report = gshard_tf.verify(model, (X, Y))
    assert report.ok
    assert {row.reference for row in report.rows} == {"TensorFlow"}
    assert any("one device: RuntimeError: RESOURCE" in note for note in report.notes)
    monkeypatch.setattr(comparison, "in_tensorflow", fail_to_run)
    with pytest.raises(RuntimeError, match="nothing to compare with"):
        gshard_tf.verify(model, (X, Y))


def fail_to_run(*_):
    raise ValueError("no kernel")
