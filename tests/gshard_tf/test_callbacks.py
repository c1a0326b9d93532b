"""Keras's callbacks on the mesh, each against plain Keras."""

import csv
import pathlib

import keras
import numpy as np
import parity
import pytest
import tensorflow as tf
from installed_versions import KERAS
from parity import assert_equal_runs

X, Y = parity.data(32)
FIT = {"batch_size": 16, "verbose": 0, "shuffle": False, "validation_data": (X, Y)}


def make():
    return parity.compiled(keras.optimizers.Adam(0.05))


def fit_with(*callbacks, epochs=4):
    def use(model):
        made = [callback(model) for callback in callbacks]
        history = model.fit(X, Y, epochs=epochs, callbacks=made, **FIT).history
        return {k: v for k, v in history.items()}

    return use


def folder(tmp_path, model):
    """One folder for the plain model, one for the other."""
    on_mesh = not isinstance(
        model.distribute_strategy, type(tf.distribute.get_strategy())
    )
    path = tmp_path / ("mesh" if on_mesh else "plain")
    path.mkdir(exist_ok=True)
    return path


def test_model_checkpoint_of_weights_and_models(tmp_path):
    def weights(model):
        return keras.callbacks.ModelCheckpoint(
            folder(tmp_path, model) / "{epoch}.weights.h5", save_weights_only=True
        )

    def best(model):
        return keras.callbacks.ModelCheckpoint(
            folder(tmp_path, model) / "best.keras",
            monitor="val_loss",
            save_best_only=True,
        )

    def batches(model):
        return keras.callbacks.ModelCheckpoint(
            folder(tmp_path, model) / "batch.weights.h5",
            save_weights_only=True,
            save_freq=3,
        )

    plain, meshed = assert_equal_runs(make, fit_with(weights, best, batches))
    names = sorted(p.name for p in (tmp_path / "plain").iterdir())
    assert names == sorted(p.name for p in (tmp_path / "mesh").iterdir())
    assert names == ["1.weights.h5", "2.weights.h5", "3.weights.h5"] + [
        "4.weights.h5",
        "batch.weights.h5",
        "best.keras",
    ]
    # Each file holds what there was then, and either kind of model can take it.
    for name in names[:-1]:
        plain.model.load_weights(tmp_path / "mesh" / name)
        meshed.model.load_weights(tmp_path / "plain" / name)
        parity.assert_same_state(meshed.model, plain.model)
    last = plain.model.get_weights()
    plain.model.load_weights(tmp_path / "mesh" / "1.weights.h5")
    first = plain.model.get_weights()
    assert any(np.abs(a - b).max() > 1e-3 for a, b in zip(last, first, strict=True))
    best_plain = keras.models.load_model(
        tmp_path / "plain" / "best.keras", {"Experts": parity.Experts}
    )
    best_mesh = keras.models.load_model(
        tmp_path / "mesh" / "best.keras", {"Experts": parity.Experts}
    )
    parity.assert_same_state(best_mesh, best_plain)


def test_early_stopping_restores_the_best_weights():
    class Spoil(keras.callbacks.Callback):
        """Makes the model worse from the third epoch on."""

        def on_epoch_begin(self, epoch, logs=None):
            if epoch >= 2:
                kernel = self.model.layers[-1].kernel
                kernel.assign(-5.0 * kernel)

    def stop(model):
        return keras.callbacks.EarlyStopping(patience=2, restore_best_weights=True)

    plain, meshed = assert_equal_runs(
        make, fit_with(lambda m: Spoil(), stop, epochs=10)
    )
    assert len(meshed.result["loss"]) == 4
    # What was restored is what the best epoch measured.
    measured = meshed.model.evaluate(X, Y, batch_size=16, verbose=0)[0]
    np.testing.assert_allclose(measured, min(meshed.result["val_loss"]), rtol=1e-5)


def test_learning_rates_and_csv_logger(tmp_path):
    def plateau(model):
        return keras.callbacks.ReduceLROnPlateau(
            monitor="val_loss", factor=0.5, patience=1, min_delta=10.0
        )

    def schedule(model):
        return keras.callbacks.LearningRateScheduler(
            lambda epoch, rate: rate if epoch < 2 else rate * 0.1
        )

    def log(model):
        return keras.callbacks.CSVLogger(folder(tmp_path, model) / "log.csv")

    def nan(model):
        return keras.callbacks.TerminateOnNaN()

    plain, meshed = assert_equal_runs(make, fit_with(schedule, plateau, log, nan))
    assert float(meshed.model.optimizer.learning_rate.numpy()) < 0.001
    assert len(set(meshed.result["learning_rate"])) > 2

    def read(name):
        with open(tmp_path / name / "log.csv") as file:
            return [
                {k: float(v) for k, v in row.items()} for row in csv.DictReader(file)
            ]

    assert len(read("mesh")) == 4
    parity.assert_close(read("mesh"), read("plain"), parity.RTOL, "log")


def test_terminate_on_nan_stops():
    x = X.copy()
    x[20] = np.nan
    run = parity.run_on_mesh(make, lambda m: None)
    history = run.model.fit(
        x,
        Y,
        batch_size=16,
        epochs=5,
        verbose=0,
        shuffle=False,
        callbacks=[keras.callbacks.TerminateOnNaN()],
    ).history
    assert len(history["loss"]) == 1


def test_tensorboard(tmp_path):
    def board(model):
        return keras.callbacks.TensorBoard(
            folder(tmp_path, model),
            histogram_freq=1,
            write_graph=True,
            write_images=False,
            update_freq="batch",
        )

    assert_equal_runs(make, fit_with(board, epochs=2))

    def summaries(name):
        found = {}
        for file in sorted((tmp_path / name).rglob("events*")):
            part = file.parent.name
            for record in tf.data.TFRecordDataset(str(file)):
                event = tf.compat.v1.Event.FromString(record.numpy())
                for value in event.summary.value:
                    if value.HasField("tensor"):
                        found[part, value.tag, event.step] = tf.make_ndarray(
                            value.tensor
                        )
        return found

    ours, theirs = summaries("mesh"), summaries("plain")
    assert set(ours) == set(theirs)
    # An older Keras writes names, not paths.
    wi = "experts/wi/histogram" if KERAS >= (3, 15) else "wi/histogram"
    assert any(wi in tag for _, tag, _ in ours)
    for key in theirs:
        if key[1].startswith(("epoch_", "batch_")) and "steps_per_second" not in key[1]:
            parity.assert_close(ours[key], theirs[key], parity.RTOL, str(key))
        if key[1].endswith("/histogram"):
            # [left, right, count] of each bucket: the same edges, the same total.
            parity.assert_close(
                ours[key][:, :2], theirs[key][:, :2], parity.RTOL, str(key)
            )
            assert ours[key][:, 2].sum() == theirs[key][:, 2].sum()


class Interrupted(Exception):
    pass


def test_backup_and_restore_after_a_real_interruption(tmp_path):
    class Interrupt(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            if epoch == 2:
                raise Interrupted

    def backup(model):
        return keras.callbacks.BackupAndRestore(tmp_path / "backup")

    def start(model):
        with pytest.raises(Interrupted):
            fit_with(backup, lambda m: Interrupt())(model)

    whole = parity.run_on_mesh(make, fit_with())
    parity.run_on_mesh(make, start)
    assert list((tmp_path / "backup").iterdir())
    # A new process would make the model anew, with other initial weights.
    keras.backend.clear_session(free_memory=False)
    keras.utils.set_random_seed(99)
    strategy = parity.strategy_of(2)
    with strategy.scope():
        model = make()
    history = fit_with(backup)(model)
    assert len(history["loss"]) == 2, "it began from the start"
    parity.assert_close(
        history["loss"], whole.result["loss"][2:], parity.RTOL, "history"
    )
    parity.assert_same_state(model, whole.model)


def test_a_callback_that_reads_and_assigns_in_the_middle_of_an_epoch():
    class Meddle(keras.callbacks.Callback):
        def __init__(self):
            super().__init__()
            self.seen = []

        def on_train_batch_end(self, batch, logs=None):
            weights = self.model.get_weights()
            self.seen.append([float(np.abs(w).sum()) for w in weights])
            self.seen.append(float(logs["loss"]))
            if batch == 0:
                self.model.layers[-1].kernel.assign_add(0.1 * np.ones_like(weights[-2]))
                self.model.optimizer.learning_rate = 0.01

        def on_test_batch_end(self, batch, logs=None):
            self.seen.append(float(self.model.layers[0].wi.numpy().sum()))

    def use(model):
        meddle = Meddle()
        history = model.fit(X, Y, epochs=2, callbacks=[meddle], **FIT).history
        return history, meddle.seen

    assert_equal_runs(make, use)


def test_swap_ema_weights():
    def make():
        return parity.compiled(
            keras.optimizers.SGD(0.1, momentum=0.9, use_ema=True, ema_momentum=0.5)
        )

    def swap(model):
        return keras.callbacks.SwapEMAWeights(swap_on_epoch=True)

    assert_equal_runs(make, fit_with(swap, epochs=2))


def test_ctrl_c_leaves_fresh_weights():
    class Press(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            if int(self.model.optimizer.iterations.numpy()) == 3:
                raise KeyboardInterrupt

    def use(model):
        with pytest.raises(KeyboardInterrupt):
            model.fit(X, Y, epochs=4, callbacks=[Press()], **FIT)
        kept = parity.state(model)
        assert int(model.optimizer.iterations.numpy()) == 3
        # And training can go on.
        return kept, model.fit(X, Y, epochs=1, **FIT).history

    assert_equal_runs(make, use)


def test_ctrl_c_while_a_step_runs(tmp_path):
    # The signal itself, in a process of its own, at whatever moment it comes.
    from processes import run_python

    tests = pathlib.Path(parity.__file__).parent
    run_python(
        f"""
        import sys
        sys.path.insert(0, {str(tests)!r})
        import os, signal, threading
        import keras
        import numpy as np
        import gshard_tf
        gshard_tf.request_cpu_devices(8)
        import parity

        # A shell's background jobs ignore Ctrl-C, and pass that on.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        x, y = parity.data(32)
        with parity.strategy_of(8).scope():
            model = parity.compiled("adam")
        model.fit(x, y, batch_size=16, verbose=0)

        class Stop(keras.callbacks.Callback):
            # Ctrl-C so many seconds after the first step.
            def __init__(self, wait):
                super().__init__()
                kill = (os.getpid(), signal.SIGINT)
                self.timer = threading.Timer(wait, os.kill, kill)

            def on_train_batch_end(self, batch, logs=None):
                if not self.timer.is_alive() and not self.timer.finished.is_set():
                    self.timer.start()

        for wait in (0.2, 0.3, 0.5):
            before = int(model.optimizer.iterations.numpy())
            try:
                model.fit(
                    x, y, batch_size=16, epochs=100_000, verbose=0,
                    callbacks=[Stop(wait)],
                )
            except KeyboardInterrupt:
                pass
            steps = int(model.optimizer.iterations.numpy())
            assert steps > before, "nothing ran before the signal"
            assert all(np.isfinite(w).all() for w in model.get_weights())
        model.fit(x, y, batch_size=16, verbose=0)
        assert int(model.optimizer.iterations.numpy()) == steps + 2
        """
    )
