"""What does not go on where it was is said, once, and only then."""

import warnings

import keras
import numpy as np
import parity
import pytest
import tensorflow as tf

import gshard_tf

X = np.random.default_rng(0).normal(size=[32, 4]).astype("float32")
BATCHES = 8


class Stop(Exception):
    """What ends a run before its time."""


class Rows(keras.utils.PyDataset):
    def __len__(self):
        return BATCHES

    def __getitem__(self, i):
        return X[4 * i : 4 * i + 4], X[4 * i : 4 * i + 4, :1]


def generator():
    while True:
        yield from Rows()


def dataset():
    return tf.data.Dataset.from_tensor_slices((X, X[:, :1])).repeat().batch(4)


def run(folder, x=None, stop_after=None, rate=0.1, seed=7, callbacks=(), **kwargs):
    """Trains two epochs of 8 batches; returns the losses and what was warned of."""
    keras.utils.set_random_seed(7)
    made = keras.Sequential([keras.layers.Input([4]), keras.layers.Dense(1)])
    made.compile(keras.optimizers.SGD(rate), "mse")
    made.jit_compile = False
    parity.build_optimizer(made)
    tf.random.set_seed(seed)
    losses = []

    def note(batch, logs):
        losses.append(logs["loss"])
        if len(losses) == stop_after:
            raise Stop

    saver = {"save_every": 1, **kwargs.pop("saver", {})}
    saver = gshard_tf.CheckpointCallback(folder, **saver)
    noting = keras.callbacks.LambdaCallback(on_train_batch_end=note)
    data = {"x": X, "y": X[:, :1], "batch_size": 4} if x is None else {"x": x}
    kwargs = {"epochs": 2, "verbose": 0, **data, **kwargs}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            made.fit(callbacks=[saver, noting, *callbacks], **kwargs)
        except Stop:
            saver.manager.close()
    said = [str(w.message) for w in caught]
    begun = ("The run resumes", "The checkpoint has another", "No checkpoint of")
    return losses, [text for text in said if text.startswith(begun)]


# What fit is given, how, and what is said of it 3 steps into an epoch.
AGAIN, SHUFFLED = "its first batches are trained again", "shuffled in another order"
DATA = {
    "arrays, shuffled": (lambda: None, {"shuffle": True, "seed": None}, SHUFFLED),
    "arrays": (lambda: None, {"shuffle": False}, None),
    "generator": (generator, {"steps_per_epoch": 8}, AGAIN),
    "arrays, shuffled, a seed": (lambda: None, {"shuffle": True}, None),
    "PyDataset": (Rows, {"shuffle": False}, None),
    "arrays, steps": (lambda: None, {"steps_per_epoch": 8}, AGAIN),
    "tf.data": (dataset, {"steps_per_epoch": 8}, AGAIN),
    "PyDataset, shuffled": (Rows, {"shuffle": True}, SHUFFLED),
}


@pytest.mark.broad(3)
@pytest.mark.parametrize("kind", DATA)
def test_data_that_is_not_where_it_was(tmp_path, kind):
    make, options, expected = DATA[kind]
    whole, _ = run(tmp_path / "whole", make(), **options)
    _, said = run(tmp_path / "run", make(), stop_after=11, **options)
    assert said == []
    rest, said = run(tmp_path / "run", make(), **options)
    assert len(rest) == 5
    if expected is None:
        # It says nothing, and it is right.
        assert said == [] and rest == whole[11:]
    else:
        [sentence] = said
        assert expected in sentence and "CheckpointCallback(dataset=...)" in sentence
        assert "at step 11, 3 steps into epoch 2" in sentence


def test_a_position_that_is_saved_is_no_matter(tmp_path):
    for stop_after, steps in ((11, 11), (None, 5)):
        feed = gshard_tf.ResumableDataset(dataset())
        losses, said = run(
            tmp_path,
            feed.dataset,
            stop_after,
            steps_per_epoch=8,
            saver={"dataset": feed},
        )
        assert said == [] and len(losses) == steps


def test_a_generator_begins_anew_at_an_epoch_too(tmp_path):
    run(tmp_path, generator(), epochs=1, steps_per_epoch=8)
    _, said = run(tmp_path, generator(), steps_per_epoch=8)
    assert len(said) == 1 and AGAIN in said[0]
    run(tmp_path / "arrays", epochs=1)
    assert run(tmp_path / "arrays")[1] == []


def test_another_learning_rate(tmp_path):
    run(tmp_path, stop_after=10, shuffle=False)
    [sentence] = run(tmp_path, stop_after=2, rate=0.025, shuffle=False)[1]
    assert "learning_rate 0.025 and 0.1" in sentence
    # Who sets it knows of it.
    setting = keras.callbacks.LearningRateScheduler(lambda epoch: 0.025)
    said = run(tmp_path, rate=0.025, shuffle=False, callbacks=[setting])[1]
    assert said == []


@pytest.mark.broad(2)
@pytest.mark.parametrize(
    "make",
    [
        lambda folder: keras.callbacks.EarlyStopping("loss", patience=9),
        lambda folder: keras.callbacks.ReduceLROnPlateau("loss"),
        lambda folder: keras.callbacks.ModelCheckpoint(
            folder / "best.keras", "loss", save_best_only=True
        ),
    ],
    ids=["EarlyStopping", "ReduceLROnPlateau", "ModelCheckpoint"],
)
def test_callbacks_that_begin_anew(tmp_path, make):
    options = {"shuffle": False, "callbacks": [make(tmp_path)]}
    # Of an epoch that is not over, they know nothing.
    assert run(tmp_path, stop_after=3, **options)[1] == []
    assert run(tmp_path, stop_after=7, **options)[1] == []
    [sentence] = run(tmp_path, **options)[1]
    name = type(options["callbacks"][0]).__name__
    assert "after epoch 1, and" in sentence and sentence.endswith(f"anew: {name}")
    every = keras.callbacks.ModelCheckpoint(tmp_path / "last.keras")
    assert run(tmp_path, epochs=3, shuffle=False, callbacks=[every])[1] == []


def test_a_metric_that_is_not_there(tmp_path):
    _, [sentence] = run(tmp_path, saver={"monitor": "val_losss"})
    assert "monitor='val_losss' is not among the logs. Received: ['loss']" in sentence
    assert run(tmp_path / "there", saver={"monitor": "loss"})[1] == []
