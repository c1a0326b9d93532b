"""N partitions = plain Keras: loss, metrics, every weight and slot after 21 steps."""

import functools

import keras
import numpy as np
import parity
import pytest

OPTIMIZERS = {
    "SGD": lambda: keras.optimizers.SGD(0.05, momentum=0.9),
    "Adam": lambda: keras.optimizers.Adam(1e-2),
    "AdamW": lambda: keras.optimizers.AdamW(1e-2, weight_decay=0.01),
    "Adafactor": lambda: keras.optimizers.Adafactor(0.02),
    "Lion": lambda: keras.optimizers.Lion(1e-3),
}
SLOW = pytest.mark.slow
EPOCHS = 7  # of 3 steps, of 16, 16 and 4 examples: 4 do not divide by 8


def make(optimizer, dropout):
    model = parity.classifier(dropout=dropout)
    model.compile(
        OPTIMIZERS[optimizer](),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy", "sparse_categorical_crossentropy"],
    )
    return model


def fit(model):
    x, y = parity.data()
    return model.fit(x, y, batch_size=16, epochs=EPOCHS, shuffle=False, verbose=0)


@functools.cache
def plain(optimizer, dropout):
    return parity.run_plain(lambda: make(optimizer, dropout), fit)


@pytest.mark.parametrize("partitions", [1, 2, 8])
@pytest.mark.parametrize(
    ("optimizer", "dropout"),
    [(name, 0.0) for name in OPTIMIZERS] + [("Adam", 0.2)],
)
def test_training_is_plain_keras(optimizer, dropout, partitions):
    expected = plain(optimizer, dropout)
    found = parity.run_on_mesh(lambda: make(optimizer, dropout), fit, partitions)
    assert int(found.model.optimizer.iterations) == 21
    parity.assert_close(found.result, expected.result, parity.RTOL, "history")
    parity.assert_same_state(found.model, expected.model)
    # It learned something, or it would be easy to agree.
    history = found.result.history["loss"]
    assert history[-1] < history[0]
    before = parity.run_plain(lambda: make(optimizer, dropout), lambda model: None)
    for new, old in zip(
        found.model.trainable_weights, before.model.trainable_weights, strict=True
    ):
        assert np.max(np.abs(new.numpy() - old.numpy())) > 1e-5


@pytest.mark.parametrize(
    "mesh",
    [{"data": 4, "model": 2}, pytest.param({"data": 2, "model": 4}, marks=[SLOW])],
)
def test_training_on_a_grid_is_plain_keras(mesh):
    # Experts over one axis; over the other their hidden width, 6.
    expected = plain("Adam", 0.0)
    found = parity.run_on_mesh(lambda: make("Adam", 0.0), fit, mesh)
    parity.assert_close(found.result, expected.result, parity.RTOL, "history")
    parity.assert_same_state(found.model, expected.model)


def test_a_rerun_is_the_same_to_the_bit():
    runs = [
        parity.run_on_mesh(lambda: make("Adam", 0.2), fit, partitions)
        for partitions in (8, 8)
    ]
    parity.assert_same_state(runs[0].model, runs[1].model, rtol=0.0)
