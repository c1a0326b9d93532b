"""Options of optimizers and precision on eight partitions, as in plain Keras."""

import keras
import parity
import pytest
from parity import assert_equal_runs

X, Y = parity.data(32)
FIT = {"batch_size": 16, "epochs": 2, "verbose": 0, "shuffle": False}


def fit(model):
    return model.fit(X, Y, **FIT)


def sparse_loss():
    return keras.losses.SparseCategoricalCrossentropy(from_logits=True)


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


@pytest.mark.broad(4)
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
