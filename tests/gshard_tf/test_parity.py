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
EPOCHS = 7  # of 3 steps
# 12 examples do not divide by 8; and a last batch of 4 is short as well.
EVEN, SHORT = (36, 12), (36, 16)


def make(optimizer, dropout):
    model = parity.classifier(dropout=dropout)
    model.compile(
        OPTIMIZERS[optimizer](),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy", "sparse_categorical_crossentropy"],
    )
    return model


def fit_on(examples, batch_size):
    x, y = parity.data(examples)

    def fit(model):
        return model.fit(
            x, y, batch_size=batch_size, epochs=EPOCHS, shuffle=False, verbose=0
        )

    return fit


@functools.cache
def plain(optimizer, dropout, batches):
    return parity.run_plain(lambda: make(optimizer, dropout), fit_on(*batches))


CASES = [(name, 0.0, EVEN) for name in OPTIMIZERS] + [
    ("Adam", 0.2, SHORT),
    ("Adafactor", 0.2, SHORT),
    ("Lion", 0.0, SHORT),
    ("SGD", 0.0, SHORT),
]
# The others are slow.
QUICK = {
    ("SGD", 0.0, EVEN, 1),
    ("Adam", 0.0, EVEN, 8),
    ("Adam", 0.2, SHORT, 8),
    ("Adafactor", 0.0, EVEN, 2),
}


def marked(*case):
    return pytest.param(*case, marks=[] if case in QUICK else pytest.mark.slow)


@pytest.mark.parametrize(
    ("optimizer", "dropout", "batches", "partitions"),
    [marked(*case, partitions) for case in CASES for partitions in (1, 2, 8)],
)
def test_training_is_plain_keras(optimizer, dropout, batches, partitions):
    expected = plain(optimizer, dropout, batches)
    found = parity.run_on_mesh(
        lambda: make(optimizer, dropout), fit_on(*batches), partitions
    )
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


@pytest.mark.broad(2)
@pytest.mark.parametrize("mesh", [{"data": 4, "model": 2}, {"data": 2, "model": 4}])
def test_training_on_a_grid_is_plain_keras(mesh):
    # Experts over one axis; over the other their hidden width, 6.
    expected = plain("Adam", 0.0, EVEN)
    found = parity.run_on_mesh(lambda: make("Adam", 0.0), fit_on(*EVEN), mesh)
    parity.assert_close(found.result, expected.result, parity.RTOL, "history")
    parity.assert_same_state(found.model, expected.model)


def test_a_rerun_is_the_same_to_the_bit():
    runs = [
        parity.run_on_mesh(lambda: make("Adam", 0.2), fit_on(*EVEN), 8)
        for _ in range(2)
    ]
    parity.assert_same_state(runs[0].model, runs[1].model, rtol=0.0)
