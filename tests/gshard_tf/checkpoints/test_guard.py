"""Steps that would make NaN change nothing, and the layer that did it is named."""

import re

import checkpoint_runs as runs
import keras
import numpy as np
import parity
import pytest
import tensorflow as tf

import gshard_tf
from gshard_tf.step import NonFiniteError


@keras.saving.register_keras_serializable("checkpoint_tests")
class Log(keras.layers.Layer):
    """NaN for rows whose first number is below -5."""

    def call(self, x):
        first = x[:, :1, :1]
        return x + 0.0 * tf.math.log(tf.where(first < -5.0, -1.0, 1.0))


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
    guard = gshard_tf.GuardNumbers("skip")
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
    [found] = skipping[1].found
    assert "Step 3 would have made NaN" in found
    assert re.search(r"the output of layer 'sequential\w*/culprit' \(Log\)", found)


def test_stopping(skipping):
    made = skipping[0]
    before = parity.state(made)
    with pytest.raises(NonFiniteError, match="the output of layer"):
        fit(made, [gshard_tf.GuardNumbers("stop")], *batches(0))
    for name, value in parity.state(made).items():
        if "total" not in name and "count" not in name:
            np.testing.assert_array_equal(value, before[name], err_msg=name)


def test_many_in_a_row_are_an_error(skipping):
    guard = gshard_tf.GuardNumbers("skip", most=2)
    with pytest.raises(NonFiniteError, match="3 such steps in a row"):
        with pytest.warns(UserWarning, match="left out"):
            fit(skipping[0], [guard], *batches(1, 2, 3, 4))
    assert len(guard.found) == 3


def test_nan_in_the_batch_is_said(skipping):
    x, y = batches()
    x[5, 0, 0] = np.nan
    guard = gshard_tf.GuardNumbers("skip")
    with pytest.warns(UserWarning, match="in the batch itself"):
        fit(skipping[0], [guard], x, y)


def test_a_gradient_is_blamed():
    made = runs.scoped(2, model, layer=Steep)
    with pytest.raises(NonFiniteError, match="the gradient .*culprit/bias"):
        fit(made, [gshard_tf.GuardNumbers("stop")], *batches())


def test_rolling_back(tmp_path):
    made = runs.scoped(2, model)
    saver = gshard_tf.SaveCheckpoints(tmp_path, every=2)
    guard = gshard_tf.GuardNumbers("roll_back", saver)
    with pytest.warns(UserWarning, match="Rolled back to step 2"):
        fit(made, [saver, guard], *batches(3))
    # Steps 1, 2, [3 and 4 undone], 5, 6.
    assert int(made.optimizer.iterations) == 4
    other = runs.scoped(2, model)
    x, y = batches()
    keep = np.r_[0:32, 64:96]
    fit(other, [], x[keep], y[keep])
    ours, theirs = gshard_tf.state_of(made), gshard_tf.state_of(other)
    for name, value in theirs.items():
        if not name.startswith("metrics"):
            np.testing.assert_array_equal(ours[name], value, err_msg=name)


def test_loss_scaling_on_a_mesh():
    """The loss scale halves, and the step is left out, as in plain Keras."""

    def make():
        made = model()
        inner = keras.optimizers.SGD(0.1)
        scaled = keras.optimizers.LossScaleOptimizer(inner, initial_scale=2.0**10)
        made.compile(scaled, made.loss)
        return made

    found = []
    for mesh in (None, 2):
        made = runs.scoped(mesh, make)
        fit(made, [], *batches(2))
        found.append(made)
    plain, meshed = found
    assert float(meshed.optimizer.dynamic_scale) == 2.0**9
    assert float(plain.optimizer.dynamic_scale) == 2.0**9
    for ours, theirs in zip(meshed.weights, plain.weights, strict=True):
        np.testing.assert_allclose(ours.numpy(), theirs.numpy(), rtol=1e-5, atol=1e-6)
    # The guard sees nothing: the optimizer has dealt with it.
    guard = gshard_tf.GuardNumbers("stop")
    fit(meshed, [guard], *batches())
    assert guard.found == []


@pytest.mark.parametrize(
    "arguments",
    [{"action": "pray"}, {"action": "roll_back"}, {"checkpoints": "x"}],
    ids=str,
)
def test_wrong_arguments(arguments):
    with pytest.raises(ValueError, match="Received"):
        gshard_tf.GuardNumbers(**arguments)


def test_a_plain_model_is_refused():
    made = model()
    with pytest.raises(ValueError, match="TerminateOnNaN"):
        fit(made, [gshard_tf.GuardNumbers()], *batches())
