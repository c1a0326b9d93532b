"""Epochs that are left in their middle, whoever leaves them, and go on there."""

import checkpoint_runs as runs
import keras
import numpy as np
import pytest
import tensorflow as tf

import gshard_tf


class StopTraining(keras.callbacks.Callback):
    """What wall-clock and preemption callbacks do."""

    def __init__(self, after):
        super().__init__()
        self.after = after

    def on_train_batch_end(self, batch, logs=None):
        self.after -= 1
        if not self.after:
            self.model.stop_training = True


class Trained(keras.callbacks.Callback):
    """The numbers of executions, and each epoch's logs."""

    def __init__(self):
        super().__init__()
        self.batches, self.losses, self.epochs = [], [], []

    def on_train_batch_end(self, batch, logs=None):
        self.batches.append(batch)
        self.losses.append(logs["loss"])

    def on_epoch_end(self, epoch, logs=None):
        self.epochs.append((epoch, logs["loss"]))


def model(mesh, **kwargs):
    def make():
        keras.utils.set_random_seed(7)
        made = keras.Sequential([keras.layers.Input([4]), keras.layers.Dense(1)])
        made.compile("adam", "mse", **kwargs)
        return made

    return runs.scoped(mesh, make)


def rows(count):
    return np.random.default_rng(0).normal(size=(count, 4)).astype("float32")


class Batches(keras.utils.PyDataset):
    """Eight batches of four rows, which differ."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.x = rows(32)

    def __len__(self):
        return 8

    def __getitem__(self, batch):
        x = self.x[4 * batch : 4 * batch + 4]
        return x, x[:, :1]


def feed():
    x = rows(32)
    dataset = tf.data.Dataset.from_tensor_slices((x, x[:, :1])).repeat().batch(4)
    return gshard_tf.ResumableDataset(dataset)


def life(folder, mesh, x, stop=None, every=3, compiled=None, **kwargs):
    """Fits; raises `Stop` within after `stop` executions."""
    made, trained = model(mesh, **(compiled or {})), Trained()
    data = x if isinstance(x, gshard_tf.ResumableDataset) else None
    saver = gshard_tf.CheckpointCallback(folder, save_every=every, dataset=data)

    def ends(batch, logs):
        if len(trained.batches) == stop:
            raise runs.Stop

    stopper = keras.callbacks.LambdaCallback(on_train_batch_end=ends)
    try:
        made.fit(
            x if data is None else data.dataset,
            verbose=0,
            callbacks=[saver, trained, stopper],
            **{"epochs": 2, "shuffle": False, **kwargs},
        )
    except runs.Stop:
        saver.manager.close()
    return made, trained, saver


@pytest.mark.broad(4)
@pytest.mark.parametrize(
    ("after", "place"), [(2, "first"), (5, "first"), (5, "last"), (8, "last")]
)
def test_stop_training_loses_nothing(tmp_path, place, after):
    """`after` 5 is the last step of an epoch, which then is over."""

    def fit(folder, extra=()):
        keras.utils.set_random_seed(7)
        made, data, losses = runs.scoped(None), runs.data(), runs.Losses()
        saver = gshard_tf.CheckpointCallback(folder, dataset=data)
        callbacks = [*extra, saver] if place == "first" else [saver, *extra]
        runs.fit(made, [*callbacks, losses], data)
        return made, losses, saver.manager

    whole, expected, _ = fit(tmp_path / "whole")
    _, _, checkpoints = fit(tmp_path / "run", [StopTraining(after)])
    manifest = checkpoints.manifest(after)
    assert (manifest.epoch, manifest.epoch_step) == divmod(after, runs.STEPS)
    made, losses, _ = fit(tmp_path / "run")
    assert losses.seen == expected.seen[after:]
    # The epoch's own metrics, not those of the validation that it was left with.
    assert losses.epochs == expected.epochs[after // runs.STEPS :]
    runs.assert_same_bits(made, whole)


@pytest.mark.broad(2)
@pytest.mark.parametrize("mesh", [2, None])
def test_stop_training_without_validation(tmp_path, mesh):
    _, whole, _ = life(tmp_path / "whole", mesh, feed(), steps_per_epoch=5)
    data, made = feed(), model(mesh)
    saver = gshard_tf.CheckpointCallback(tmp_path / "run", dataset=data)
    made.fit(
        data.dataset,
        epochs=2,
        steps_per_epoch=5,
        verbose=0,
        callbacks=[saver, StopTraining(7)],
    )
    _, rest, saver = life(tmp_path / "run", mesh, data, steps_per_epoch=5)
    assert rest.batches == [2, 3, 4] and saver.step == 10
    assert rest.losses == whole.losses[7:]
    assert rest.epochs == whole.epochs[1:]


@pytest.mark.broad(4)
@pytest.mark.parametrize(("mesh", "stop"), [(None, 7), (None, 8), (None, 13), (2, 7)])
def test_a_pydataset_goes_on_in_its_epoch(tmp_path, mesh, stop):
    whole, every, _ = life(tmp_path / "whole", mesh, Batches(), every=None)
    life(tmp_path / "run", mesh, Batches(), stop)
    made, trained, saver = life(tmp_path / "run", mesh, Batches())
    done = 3 * (stop // 3)
    assert trained.batches == every.batches[done:]
    assert saver.step == 16
    # The batches that are left, not the first ones again.
    assert trained.losses == every.losses[done:]
    assert trained.epochs == every.epochs[done // 8 :]
    runs.assert_same_bits(made, whole)


def test_the_workers_of_a_pydataset_keep_nothing_back(tmp_path):
    whole, every, _ = life(tmp_path / "whole", None, Batches(workers=2), every=None)
    life(tmp_path / "run", None, Batches(workers=2), 7)
    made, trained, _ = life(tmp_path / "run", None, Batches(workers=2))
    assert trained.losses == every.losses[6:]
    runs.assert_same_bits(made, whole)


def test_a_pass_of_unknown_length_goes_on(tmp_path):
    def data():
        x = rows(32)
        dataset = tf.data.Dataset.from_tensor_slices((x, x[:, :1])).batch(4)
        return dataset.filter(lambda x, y: True)

    whole, every, _ = life(tmp_path / "whole", None, data(), every=None)
    life(tmp_path / "run", None, data(), 7)
    made, trained, _ = life(tmp_path / "run", None, data())
    assert trained.losses == every.losses[6:]
    runs.assert_same_bits(made, whole)


@pytest.mark.broad(5)
@pytest.mark.parametrize(
    ("mesh", "stop"), [(None, 3), (None, 1), (None, 2), (None, 5), (2, 2)]
)
def test_executions_that_do_not_divide_an_epoch(tmp_path, mesh, stop):
    """Keras trains three executions of 4 steps where an epoch has 9."""
    given = {"compiled": {"steps_per_execution": 4}, "steps_per_epoch": 9}
    whole, every, saver = life(tmp_path / "whole", mesh, feed(), every=4, **given)
    assert every.batches == [3, 7, 11] * 2 and saver.step == 24
    life(tmp_path / "run", mesh, feed(), stop, every=4, **given)
    made, trained, saver = life(tmp_path / "run", mesh, feed(), every=4, **given)
    # The last execution of an epoch is saved when the epoch has ended.
    done = 2 if stop == 3 else stop
    assert trained.batches == every.batches[done:] and saver.step == 24
    assert trained.losses == every.losses[done:]
    runs.assert_same_bits(made, whole)


def test_other_executions_within_an_epoch(tmp_path):
    life(tmp_path, None, feed(), 4, steps_per_epoch=8)
    given = {"compiled": {"steps_per_execution": 2}, "steps_per_epoch": 8}
    with pytest.raises(ValueError, match="Received: steps_per_execution=2"):
        life(tmp_path, None, feed(), **given)


def test_a_finished_run_leaves_no_first_epoch_behind(tmp_path):
    x = rows(8)
    life(tmp_path, None, feed(), steps_per_epoch=2)
    made, trained, _ = life(tmp_path, None, feed(), steps_per_epoch=2)
    assert trained.batches == []
    history = made.fit(x, x[:, :1], epochs=1, verbose=0)
    assert len(history.epoch) == 1


def test_a_loop_that_is_not_fit_is_refused_within_an_epoch(tmp_path):
    life(tmp_path, None, feed(), 4, steps_per_epoch=8)
    data = feed()
    saver = gshard_tf.CheckpointCallback(tmp_path, dataset=data)
    callbacks = keras.callbacks.CallbackList([saver], model=model(None), steps=8)
    callbacks.on_train_begin()
    with pytest.raises(ValueError, match="a loop that calls callbacks by itself"):
        callbacks.on_epoch_begin(0)
    saver.manager.close()


def stopped_early(folder, *callbacks, epochs=6):
    made, data = model(None), feed()
    saver = gshard_tf.CheckpointCallback(folder, dataset=data)
    # Where "saver" stands, as a callback may stand before it and behind it.
    given = [saver if c == "saver" else c for c in callbacks]
    history = made.fit(
        data.dataset, epochs=epochs, steps_per_epoch=2, verbose=0, callbacks=given
    )
    return history.epoch, saver


def early_stopping(**kwargs):
    """No loss falls by so much: it stops after `patience` epochs, two at least."""
    kwargs = {"monitor": "loss", "min_delta": 1e9, **kwargs}
    return keras.callbacks.EarlyStopping(**kwargs)


@pytest.mark.broad(2)
@pytest.mark.parametrize("saver_first", [True, False])
def test_a_run_that_early_stopping_ended_is_finished(tmp_path, saver_first):
    def callbacks(**kwargs):
        made = ["saver", early_stopping(**kwargs)]
        return made if saver_first else made[::-1]

    epochs, saver = stopped_early(tmp_path, *callbacks())
    assert epochs == [0, 1]
    assert saver.manager.manifest(4).ended_by[0]["monitor"] == "loss"
    for length in (6, 9):
        with pytest.warns(UserWarning, match="finished: EarlyStopping .* step 4, "):
            epochs, saver = stopped_early(tmp_path, *callbacks(), epochs=length)
        assert epochs == [] and saver.step == 4
    # Told to go on, it goes on.
    epochs, saver = stopped_early(tmp_path, *callbacks(patience=2))
    assert epochs == [2, 3, 4]
    epochs, saver = stopped_early(tmp_path, "saver")
    assert epochs == [5] and saver.step == 12


def test_whoever_else_stops_a_run_does_not_finish_it(tmp_path):
    """A time limit at an epoch's end, say."""

    class Limit(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            self.model.stop_training = True

    for expected in ([0], [1], [2]):
        patient = early_stopping(patience=5)
        epochs, saver = stopped_early(tmp_path, "saver", Limit(), patient)
        assert epochs == expected
    assert saver.manager.manifest(6).ended_by is None
