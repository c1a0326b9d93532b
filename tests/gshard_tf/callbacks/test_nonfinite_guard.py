"""Steps that would make NaN change nothing, and the layer that did it is named."""

import re

import checkpoint_runs as runs
import keras
import numpy as np
import parity
import pytest
import tensorflow as tf

import gshard_tf
from gshard_tf.spmd.nonfinite import NonFiniteError


@keras.saving.register_keras_serializable("checkpoint_tests")
class Log(keras.layers.Layer):
    """NaN for rows whose first number is below -5."""

    def call(self, x):
        first = x[:, :1, :1]
        sign = tf.cast(tf.where(first < -5.0, -1.0, 1.0), x.dtype)
        return x + 0.0 * tf.math.log(sign)


@keras.saving.register_keras_serializable("checkpoint_tests")
class Steep(keras.layers.Layer):
    """Finite outputs, and an infinite gradient for a weight that is 0."""

    def build(self, shape):
        self.bias = self.add_weight(
            shape=(shape[-1],), initializer="zeros", name="bias"
        )

    def call(self, x):
        return x + tf.sqrt(self.bias)


def model(layer=Log):
    keras.utils.set_random_seed(7)
    made = keras.Sequential(
        [
            keras.layers.Input([8, 4]),
            parity.Experts(dropout=0.2),
            layer(name="culprit"),
            keras.layers.Flatten(),
            keras.layers.Dense(3),
        ]
    )
    made.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    return made


def batches(*bad):
    """Six batches of 16; those of `bad` have a row that makes NaN."""
    x, y = parity.data(96)
    x = 0.1 * x
    for batch in bad:
        x[16 * batch + 3, 0, 0] = -500.0
    return x, y


def fit(made, callbacks, x, y):
    made.fit(x, y, batch_size=16, shuffle=False, verbose=0, callbacks=callbacks)


@pytest.fixture(scope="module")
def skipping():
    """A run of six steps whose third is skipped, and the guard."""
    made = runs.scoped(2, model)
    guard = gshard_tf.NonFiniteGuard("skip")
    with pytest.warns(UserWarning, match="The step was left out"):
        fit(made, [guard], *batches(2))
    return made, guard


def test_a_skipped_step_changes_nothing(skipping):
    made, guard = skipping
    other = runs.scoped(2, model)
    x, y = batches()
    keep = np.r_[0:32, 48:96]
    fit(other, [], x[keep], y[keep])
    runs.assert_same_bits(made, other)
    assert int(made.optimizer.iterations) == 5


def test_the_layer_is_named(skipping):
    [message] = skipping[1].skipped
    assert "Step 3 would have made NaN" in message
    assert re.search(r"the output of layer 'sequential\w*/culprit' \(Log\)", message)


def test_stopping(skipping):
    made = skipping[0]
    before = parity.state(made)
    with pytest.raises(NonFiniteError, match="the output of layer"):
        fit(made, [gshard_tf.NonFiniteGuard("raise")], *batches(0))
    for name, value in parity.state(made).items():
        if "total" not in name and "count" not in name:
            np.testing.assert_array_equal(value, before[name], err_msg=name)


def test_many_in_a_row_are_an_error(skipping):
    guard = gshard_tf.NonFiniteGuard("skip", max_consecutive=2)
    with pytest.raises(NonFiniteError, match="3 such steps in a row"):
        with pytest.warns(UserWarning, match="left out"):
            fit(skipping[0], [guard], *batches(1, 2, 3, 4))
    assert len(guard.skipped) == 3


@pytest.mark.broad(2)
@pytest.mark.parametrize("guard_first", [True, False])
def test_an_epoch_of_skipped_steps_is_of_nothing(skipping, tmp_path, guard_first):
    """Its metrics are not 0, which would be the best of all."""
    x, y = batches(0, 1, 2)
    dataset = tf.data.Dataset.from_tensor_slices((x, y)).batch(16).repeat()
    saver = gshard_tf.CheckpointCallback(
        tmp_path, save_every=1, max_to_keep=None, monitor="loss"
    )
    seen = []
    noting = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda batch, logs: seen.append(logs["loss"]),
        on_train_end=lambda logs: seen.append(logs["loss"]),
    )
    callbacks = [saver, noting]
    callbacks.insert(0 if guard_first else 2, gshard_tf.NonFiniteGuard("skip"))
    with pytest.warns(UserWarning, match="left out"):
        history = skipping[0].fit(
            dataset,
            epochs=3,
            steps_per_epoch=2,
            validation_data=(x[48:], y[48:]),
            callbacks=callbacks,
            verbose=0,
        )
    losses = history.history["loss"]
    # Batch 2 is skipped too, but not batch 3, of the same epoch.
    assert np.isnan(losses).tolist() == [True, False, False]
    assert np.isnan(seen).tolist() == [True] * 3 + [False] * 4
    assert np.all(np.isfinite(history.history["val_loss"]))
    logs = {step: saver.manager.manifest(step).logs["loss"] for step in range(1, 7)}
    assert [step for step in logs if np.isnan(logs[step])] == [1, 2, 3]
    assert saver.manager.best() == min({4, 5, 6}, key=logs.get)


def test_an_epoch_without_a_step_that_counts():
    """The same where an execution has several steps."""

    def make():
        made = model()
        made.compile("adam", made.loss, steps_per_execution=2)
        return made

    made = runs.scoped(2, make)
    with pytest.warns(UserWarning, match="left out"):
        history = made.fit(
            tf.data.Dataset.from_tensor_slices(batches(0, 1, 2)).batch(16),
            epochs=2,
            steps_per_epoch=2,
            callbacks=[gshard_tf.NonFiniteGuard("skip")],
            verbose=0,
        )
    assert np.isnan(history.history["loss"]).tolist() == [True, False]


def test_nan_in_the_batch_is_said(skipping):
    x, y = batches()
    x[5, 0, 0] = np.nan
    guard = gshard_tf.NonFiniteGuard("skip")
    with pytest.warns(UserWarning, match="in the batch itself"):
        fit(skipping[0], [guard], x, y)


def test_a_gradient_is_blamed():
    made = runs.scoped(2, model, layer=Steep)
    with pytest.raises(NonFiniteError, match="the gradient .*culprit/bias"):
        fit(made, [gshard_tf.NonFiniteGuard("raise")], *batches())


def test_rolling_back(tmp_path):
    made = runs.scoped(2, model)
    saver = gshard_tf.CheckpointCallback(tmp_path, save_every=2)
    guard = gshard_tf.NonFiniteGuard("roll_back", saver)
    with pytest.warns(UserWarning, match="Rolled back to step 2"):
        fit(made, [saver, guard], *batches(3))
    # Steps 1, 2, [3 and 4 undone], 5, 6.
    assert int(made.optimizer.iterations) == 4
    other = runs.scoped(2, model)
    x, y = batches()
    keep = np.r_[0:32, 64:96]
    fit(other, [], x[keep], y[keep])
    ours, theirs = gshard_tf.training_state(made), gshard_tf.training_state(other)
    for name, value in theirs.items():
        if not name.startswith("metrics"):
            np.testing.assert_array_equal(ours[name], value, err_msg=name)


def test_loss_scaling_on_a_mesh():
    """In float16: gradients overflow, steps are left out, the scale finds its size."""

    def make():
        keras.config.set_dtype_policy("mixed_float16")
        try:
            made = model()
        finally:
            keras.config.set_dtype_policy("float32")
        # So large that the first gradients are infinite.
        scaled = keras.optimizers.LossScaleOptimizer(
            keras.optimizers.SGD(0.1), initial_scale=2.0**20
        )
        made.compile(scaled, made.loss)
        return made

    x, y = batches()
    # The guard sees nothing: the optimizer deals with it.
    guard = gshard_tf.NonFiniteGuard("raise")
    found = []
    for mesh, callbacks in ((None, []), (2, []), (2, [guard])):
        made = runs.scoped(mesh, make)
        assert made.layers[0].compute_dtype == "float16"
        start = [weight.numpy() for weight in made.trainable_variables]
        fit(made, callbacks, x, y)
        assert any(
            np.any(weight.numpy() != before)
            for weight, before in zip(made.trainable_variables, start, strict=True)
        )
        found.append(made)
    plain = found[0]
    skipped = 20 - np.log2(plain.optimizer.dynamic_scale.numpy())
    assert 0 < skipped < 6
    assert int(plain.optimizer.inner_optimizer.iterations) == 6 - skipped
    for made in found[1:]:
        assert float(made.optimizer.dynamic_scale) == 2.0 ** (20 - skipped)
        assert int(made.optimizer.inner_optimizer.iterations) == 6 - skipped
        for ours, theirs in zip(made.weights, plain.weights, strict=True):
            np.testing.assert_allclose(
                ours.numpy(), theirs.numpy(), rtol=2e-3, atol=2e-3
            )
    assert guard.skipped == []


class Interrupts(keras.callbacks.Callback):
    """Ctrl-C at the begin or the end of the second batch, as a callback."""

    def __init__(self, where):
        super().__init__()
        self.where = where

    def on_train_batch_begin(self, batch, logs=None):
        if (self.where, batch) == ("begin", 1):
            raise KeyboardInterrupt

    def on_train_batch_end(self, batch, logs=None):
        if (self.where, batch) == ("end", 1):
            raise KeyboardInterrupt


@pytest.mark.broad(3)
@pytest.mark.parametrize("where", ["step", "begin", "end"])
def test_an_interrupted_guard_is_off(skipping, tmp_path, where):
    """The batch that it is interrupted in is a bad one, too."""
    made = skipping[0]
    extended = made.distribute_strategy.extended
    before = [(v, v.numpy()) for v in gshard_tf.training_state(made).values()]
    guard, interrupts = gshard_tf.NonFiniteGuard("skip"), Interrupts(where)
    run, calls = made.train_function, []

    def interrupted(iterator):
        run(iterator)
        calls.append(None)
        if len(calls) == 2:
            raise KeyboardInterrupt

    if where == "step":
        made.train_function = interrupted
    with pytest.raises(KeyboardInterrupt):
        # Between what the guard does and the rest.
        order = [interrupts, guard] if where == "end" else [guard, interrupts]
        fit(made, order, *batches(1))
    if where == "step":
        made.train_function = run
    assert not extended.keep_finite and extended.skipped_steps == []
    # A later run without a guard: as if there had never been one.
    saver = gshard_tf.CheckpointCallback(tmp_path, save_every=2, max_to_keep=None)
    losses = []
    noting = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda batch, logs: losses.append(logs["loss"])
    )
    fit(made, [saver, noting], *batches(0))
    assert np.all(np.isnan(losses)) and len(losses) == 6
    assert saver.manager.steps() == [2, 4, 6]
    assert extended.skipped_steps == []
    # Other tests share the model, which is NaN now.
    for variable, value in before:
        variable.assign(value)


def test_a_diagnosis_that_raises_ends_no_run(skipping):
    """A label out of range makes NaN in the program, and raises on the host."""
    made = skipping[0]
    x, y = batches()
    y[20] = 7
    guard = gshard_tf.NonFiniteGuard("skip")
    before = int(made.optimizer.iterations)
    with pytest.warns(UserWarning, match="(?s)label value of 7 .*was left out"):
        fit(made, [guard], x, y)
    assert int(made.optimizer.iterations) == before + 5
    [message] = guard.skipped
    assert "Step" in message and "InvalidArgumentError" in message
    with pytest.raises(NonFiniteError, match="label value of 7"):
        fit(made, [gshard_tf.NonFiniteGuard("raise")], x, y)


def test_a_loop_that_is_not_fit_is_refused(skipping):
    guard = gshard_tf.NonFiniteGuard()
    guard.set_model(skipping[0])
    with pytest.raises(ValueError, match="Keras's own `fit`"):
        guard.on_train_begin()


@pytest.mark.parametrize(
    "arguments",
    [{"action": "pray"}, {"action": "roll_back"}, {"checkpoint": "x"}],
    ids=str,
)
def test_wrong_arguments(arguments):
    with pytest.raises(ValueError, match="Received"):
        gshard_tf.NonFiniteGuard(**arguments)


def test_a_plain_model_is_refused():
    made = model()
    with pytest.raises(ValueError, match="TerminateOnNaN"):
        fit(made, [gshard_tf.NonFiniteGuard()], *batches())
