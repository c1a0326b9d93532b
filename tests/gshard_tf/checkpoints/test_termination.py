"""SIGTERM while `fit` runs: nothing is lost, the process ends in time, by its code."""

import gc
import os
import signal
import tempfile
import time

import checkpoint_runs as runs
import keras
import pytest
from forks import Fork
from processes import ROOT

import gshard_tf
from gshard_tf.runtime import termination


@pytest.fixture(autouse=True)
def nobody_listens():
    """Other tests of this process end a `fit` by an exception, and leave a listener."""
    while termination._LISTENING:
        termination._LISTENING[-1].close()


class Terminate(keras.callbacks.Callback):
    """Sends SIGTERM to this process, once, at the `count`-th call of a hook."""

    def __init__(self, hook, count):
        super().__init__()
        self.count = count
        setattr(self, hook, self._call)

    def _call(self, *args, **kwargs):
        self.count -= 1
        if not self.count:
            os.kill(os.getpid(), signal.SIGTERM)
            # The thread that listens hears of it.
            time.sleep(0.2)


class Seen(keras.callbacks.Callback):
    """What a callback that is not ours sees of a run: losses, and logs of epochs."""

    def __init__(self):
        super().__init__()
        self.losses, self.epochs = [], []

    def on_train_batch_end(self, batch, logs=None):
        self.losses.append(logs["loss"])

    def on_epoch_end(self, epoch, logs=None):
        self.epochs.append((epoch, dict(logs)))


def life(folder, mesh, *others):
    """Two epochs of four steps, each with two batches of validation."""
    keras.utils.set_random_seed(7)
    feed, made, seen = runs.data(), runs.scoped(mesh), Seen()
    x, y = runs.parity.data(32, seed=5)
    # Nothing but the test's time ends the process that the test is in.
    saver = gshard_tf.CheckpointCallback(folder, dataset=feed, grace=1000)
    listeners = []
    note = keras.callbacks.LambdaCallback(
        on_train_begin=lambda logs: listeners.append(saver._termination)
    )
    try:
        made.fit(
            feed.dataset,
            epochs=2,
            steps_per_epoch=4,
            validation_data=(x, y),
            validation_batch_size=16,
            verbose=0,
            callbacks=[saver, note, seen, *others],
        )
    except SystemExit as end:
        assert end.code == os.EX_TEMPFAIL
        # Or it would end this process, which goes on, when the time is over.
        [listener] = listeners
        listener.close()
    else:
        assert not others, "the run went on"
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert signal.set_wakeup_fd(-1) == -1
    return made, seen, saver


@pytest.fixture(scope="module", params=[None, 2], ids=str)
def whole(request, tmp_path_factory):
    return request.param, life(tmp_path_factory.mktemp("whole"), request.param)


@pytest.mark.broad(8)
@pytest.mark.parametrize(
    ("hook", "count", "saved"),
    [
        ("on_train_batch_begin", 1, 1),
        ("on_train_batch_end", 2, 2),
        ("on_train_batch_end", 4, 4),
        ("on_test_begin", 1, 4),
        ("on_test_batch_end", 1, 4),
        ("on_test_end", 1, 4),
        ("on_epoch_end", 1, 4),
        ("on_train_batch_end", 8, 8),
    ],
)
def test_nothing_is_lost(whole, tmp_path, hook, count, saved):
    mesh, (model, seen, _) = whole
    if mesh and hook not in ("on_test_batch_end", "on_train_batch_end"):
        pytest.skip("as without a mesh")
    _, before, saver = life(tmp_path, mesh, Terminate(hook, count))
    assert saver.step == saved == len(before.losses)
    again, after, saver = life(tmp_path, mesh)
    assert saver.restored.manifest.step == saved
    # Each step once, each epoch's end once, all with what they would have had.
    assert before.losses + after.losses == seen.losses
    assert before.epochs + after.epochs == seen.epochs
    runs.assert_same_bits(again, model)


def test_after_an_error_the_signal_is_not_taken(tmp_path):
    """`fit` that an exception ended cannot give the signal back at once."""
    heard = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: heard.append(number))
    try:
        runs.run(tmp_path, mesh=None, stop_after=2, grace=1000)
        os.kill(os.getpid(), signal.SIGTERM)
        assert heard == [signal.SIGTERM]
        os.kill(os.getpid(), signal.SIGTERM)
        assert heard == [signal.SIGTERM] * 2
    finally:
        signal.signal(signal.SIGTERM, before)


SCRIPT = """
import os, signal, sys, time
import checkpoint_runs as runs
import keras

class Slow(keras.callbacks.Callback):
    def on_train_batch_end(self, batch, logs=None):
        print("step", flush=True)
        time.sleep(float(sys.argv[2]))

runs.Losses = lambda stop: Slow()
runs.run(sys.argv[1], mesh=None, epochs=1000, grace=float(sys.argv[3]))
"""


def terminated(folder, seconds, grace):
    """Exit code, standard error and seconds from the signal to the end."""
    reading, writing = os.pipe()
    env = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    with os.fdopen(reading) as printed, tempfile.TemporaryFile("w+") as errors:
        with os.fdopen(writing) as stdout:
            process = Fork(
                SCRIPT,
                [folder, seconds, grace],
                env=env,
                cwd=ROOT,
                stdout=stdout,
                stderr=errors,
            )
        assert printed.readline() == "step\n"
        printed.readline()
        os.kill(process.pid, signal.SIGTERM)
        begun = time.monotonic()
        code = process.wait(100)
        ended = time.monotonic()
        errors.seek(0)
        return code, errors.read(), ended - begun


def test_the_process_ends_by_its_code(tmp_path):
    code, error, _ = terminated(tmp_path, 0.1, 60)
    assert code == os.EX_TEMPFAIL
    step = gshard_tf.CheckpointManager(tmp_path).steps()[-1]
    assert f"SIGTERM: the run is saved at step {step}. Give the same command" in error


def test_a_step_that_does_not_end(tmp_path):
    """Within the grace period, whatever the main thread does."""
    runs.run(tmp_path, mesh=None, epochs=1)
    code, error, seconds = terminated(tmp_path, 5, 2)
    assert code == os.EX_TEMPFAIL and seconds < 4.5
    assert "did not end within 2 s. The newest checkpoint is of step 5" in error


def test_a_fork_keeps_no_handler(tmp_path):
    """A worker of a pool dies of SIGTERM, and the run does not hear of it."""
    ended = []

    class Fork(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            if batch == 1:
                child = os.fork()
                if not child:
                    time.sleep(60)
                    os._exit(1)
                time.sleep(0.1)
                os.kill(child, signal.SIGTERM)
                ended.append(os.waitpid(child, 0)[1])
                time.sleep(0.7)

    made = runs.scoped(None)
    saver = gshard_tf.CheckpointCallback(tmp_path, grace=1000)
    runs.fit(made, [saver, Fork()], epochs=1)
    assert ended == [signal.SIGTERM]
    assert saver.step == runs.STEPS


@pytest.mark.parametrize("grace", [0, -1, float("nan")])
def test_grace_is_a_time(tmp_path, grace):
    with pytest.raises(ValueError, match="Received: "):
        gshard_tf.CheckpointCallback(tmp_path, grace=grace)


def test_a_loop_of_ones_own_that_has_ended_gives_the_signal_back(tmp_path):
    """No `fit` tells that it has ended; the callback itself is gone then."""
    made = runs.scoped(None)
    saver = gshard_tf.CheckpointCallback(tmp_path)
    saver.set_model(made)
    saver.set_params({"epochs": 1, "steps": 4})
    saver.on_train_begin()
    assert termination._LISTENING[-1].still_runs()
    del saver
    gc.collect()
    assert not termination._LISTENING[-1].still_runs()
