"""What is kept, what is refused, what a damaged checkpoint leads to."""

import errno
import fcntl
import gc
import os
import random
import resource
import shutil
import signal
import threading

import checkpoint_runs as runs
import keras
import numpy as np
import parity
import pytest
import tensorflow as tf

import gshard_tf
from gshard_tf.checkpoints import manager
from gshard_tf.checkpoints.cli import main as command
from gshard_tf.checkpoints.errors import CheckpointMismatchError, CorruptCheckpointError
from gshard_tf.checkpoints.writer import write
from gshard_tf.io.locks import AlreadyRunningError


def variables(value=0.0):
    return {
        "model/a": tf.Variable(np.full([4, 3], value, "float32")),
        "model/b": tf.Variable(np.full([5], value), dtype=tf.bfloat16),
        "optimizer/iteration": tf.Variable(int(value), dtype=tf.int64),
    }


def assert_values(state, value):
    for name, variable in state.items():
        assert np.all(variable.numpy().astype("float32") == value), name


@pytest.fixture
def two(tmp_path):
    """A folder with the checkpoints of steps 1 and 2, all ones and all twos."""
    checkpoints = gshard_tf.CheckpointManager(tmp_path, asynchronous=False)
    for step in (1, 2):
        checkpoints.save(variables(step), step)
    checkpoints.close()
    return tmp_path


@pytest.mark.parametrize("background", [True, False])
def test_the_newest_and_the_best_are_kept(tmp_path, background):
    checkpoints = gshard_tf.CheckpointManager(
        tmp_path, max_to_keep=2, monitor="val_loss", asynchronous=background
    )
    for step, loss in enumerate([3.0, 1.0, 2.0, float("nan"), 1.0, 4.0]):
        checkpoints.save(variables(step), step, logs={"val_loss": loss})
    checkpoints.wait()
    assert checkpoints.steps() == [1, 4, 5]
    assert checkpoints.best() == 1
    state = variables(9)
    checkpoints.restore(state, step=checkpoints.best())
    assert_values(state, 1)


def test_a_save_has_the_values_of_its_moment(tmp_path, monkeypatch):
    stepped = threading.Event()

    def late(*arguments):
        assert stepped.wait(60)
        write(*arguments)

    monkeypatch.setattr(manager, "write", late)
    made = runs.scoped(2)
    x, y = parity.data(16)
    made.train_on_batch(x, y)
    checkpoints = gshard_tf.CheckpointManager(tmp_path)
    saved = parity.state(made)
    checkpoints.save(gshard_tf.training_state(made), 1)
    made.train_on_batch(x, y)
    stepped.set()
    checkpoints.wait()
    assert any(np.any(v != saved[n]) for n, v in parity.state(made).items())
    checkpoints.restore(gshard_tf.training_state(made))
    for name, value in parity.state(made).items():
        np.testing.assert_array_equal(value, saved[name], err_msg=name)


def test_all_kinds_of_numbers(tmp_path):
    """Large enough to be handed over in place, from devices and from the host."""
    kinds = ["float32", "float64", "float16", "bfloat16", "int32", "int64", "uint8"]
    kinds += ["bool", "complex64"]
    values = np.random.default_rng(0).integers(0, 2, [64, 64])
    for mesh in (4, None):
        strategy = parity.strategy_of(4) if mesh else tf.distribute.get_strategy()
        with strategy.scope():
            state = {
                f"model/{kind}": tf.Variable(tf.cast(values, kind)) for kind in kinds
            }

        @tf.function
        def step(state=state):
            for variable in state.values():
                variable.assign(tf.identity(variable))
            return tf.constant(0)

        strategy.run(step)
        checkpoints = gshard_tf.CheckpointManager(
            tmp_path / str(mesh), asynchronous=False
        )
        checkpoints.save(state, 1)
        zeros = {n: tf.Variable(tf.zeros_like(v)) for n, v in state.items()}
        checkpoints.restore(zeros)
        for name, value in zeros.items():
            np.testing.assert_array_equal(value.numpy().astype("int64"), values, name)


def test_pieces_are_written_one_by_one(tmp_path):
    """Eight slices in the file, none of them whole; TensorFlow reads it alone."""
    made, _, saver = runs.run(tmp_path, stop_after=6)
    path = saver.manager.path(saver.manager.steps()[-1])
    weight = made.layers[0].wi
    read = tf.train.load_checkpoint(str(path / "state"))
    shapes = read.get_variable_to_shape_map()
    name = "model/sequential/experts/wi"
    assert shapes[name] == list(weight.shape)
    index = (path / "state.index").read_bytes()
    # One entry for the whole, and one for each slice.
    assert index.count(b"experts/wi") >= 1
    array = saver.manager.manifest(saver.manager.steps()[-1]).arrays[name]
    assert array.split[0] == "expert"
    fresh = runs.scoped(None)
    gshard_tf.CheckpointManager(tmp_path).restore(gshard_tf.training_state(fresh))
    np.testing.assert_array_equal(read.get_tensor(name), fresh.layers[0].wi.numpy())


def test_every_flipped_bit_is_noticed(two):
    rng = random.Random(2)
    files = sorted((two / "step-0000000002").iterdir())
    assert len(files) == 3
    fell_back = 0
    for i in range(60):
        path = files[i % 3]
        whole = path.read_bytes()
        broken = bytearray(whole)
        broken[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        path.write_bytes(broken)
        state = variables(9)
        with pytest.warns(UserWarning, match="Falling back"):
            found = gshard_tf.CheckpointManager(two).restore(state)
        assert found.manifest.step == 1
        assert_values(state, 1)
        fell_back += 1
        path.write_bytes(whole)
    assert gshard_tf.CheckpointManager(two).restore(variables()).manifest.step == 2


def damage_shard(path):
    [data] = path.glob("state.data*")
    os.truncate(data, 3)


def remove_shard(path):
    next(path.glob("state.data*")).unlink()


def remove_manifest(path):
    (path / "manifest.json").unlink()


@pytest.mark.parametrize("damage", [damage_shard, remove_shard, remove_manifest])
def test_a_damaged_checkpoint_is_passed_over(two, damage, capsys):
    damage(two / "step-0000000002")
    state = variables(9)
    with pytest.warns(UserWarning, match="Falling back"):
        gshard_tf.CheckpointManager(two).restore(state)
    assert_values(state, 1)
    with pytest.raises(CorruptCheckpointError, match="is damaged"):
        gshard_tf.CheckpointManager(two).restore(state, step=2)
    assert command(["verify", str(two)]) == 1
    assert "DAMAGED" in capsys.readouterr().out
    damage(two / "step-0000000001")
    state = variables(9)
    with (
        pytest.warns(UserWarning),
        pytest.raises(CorruptCheckpointError, match="No checkpoint"),
    ):
        gshard_tf.CheckpointManager(two).restore(state)
    assert_values(state, 9)


def test_nothing_changes_when_a_later_array_is_damaged(two):
    [data] = (two / "step-0000000002").glob("state.data*")
    content = bytearray(data.read_bytes())
    content[-1] ^= 1
    data.write_bytes(content)
    state = variables(9)
    with pytest.raises(CorruptCheckpointError):
        gshard_tf.CheckpointManager(two).restore(state, step=2)
    assert_values(state, 9)


def test_the_command(two, capsys):
    assert command(["list", str(two)]) == 0
    assert capsys.readouterr().out.count("step") == 2
    assert command(["verify", str(two), "--step", "1", "--json"]) == 0
    capsys.readouterr()
    assert command(["show", str(two)]) == 0
    assert "model/a  [4, 3]  float32" in capsys.readouterr().out
    assert command(["list", str(two / "nothing")]) == 2
    assert "must have checkpoints" in capsys.readouterr().err
    assert command(["verify", str(two), "--step", "7"]) == 2
    output = capsys.readouterr()
    assert output.out == "" and "--step must be one of 1, 2. There is no" in output.err
    # The folder of a run that keeps them in one of its own.
    two.parent.joinpath("run").mkdir()
    two.rename(two.parent / "run" / "checkpoints")
    assert command(["list", str(two.parent / "run")]) == 0
    assert capsys.readouterr().out.count("step") == 2


def test_two_runs_in_one_folder(tmp_path):
    tmp_path.joinpath(".lock").touch()
    with open(tmp_path / ".lock") as another_run:
        fcntl.flock(another_run, fcntl.LOCK_EX)
        with pytest.raises(AlreadyRunningError, match="another run"):
            gshard_tf.CheckpointManager(tmp_path).save(variables(2), 2)
    first = gshard_tf.CheckpointManager(tmp_path)
    first.save(variables(1), 1)
    # The same process, after an interrupted `fit`, say.
    second = gshard_tf.CheckpointManager(tmp_path, asynchronous=False)
    second.save(variables(2), 2)
    assert first.steps() == [1, 2]
    # And when nobody has the other one any more.
    del second
    gc.collect()
    first.save(variables(3), 3)
    first.wait()
    assert first.steps() == [1, 2, 3]


@pytest.mark.parametrize("background", [True, False])
def test_a_full_disk(two, background):
    """No file may grow: as on a full disk, an error from the system."""
    checkpoints = gshard_tf.CheckpointManager(two, asynchronous=background)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (16, limits[1]))
        with pytest.raises(OSError, match="step-0000000003") as caught:
            checkpoints.save(variables(3), 3)
            checkpoints.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert caught.value.errno == errno.EFBIG
    assert checkpoints.steps() == [1, 2]
    assert [p.name for p in two.iterdir() if p.name.startswith(".")] == [".lock"]
    checkpoints.save(variables(3), 3)
    checkpoints.wait()
    assert checkpoints.steps() == [1, 2, 3]


def test_what_a_killed_run_left_is_removed(two):
    (two / ".step-0000000007.partial").mkdir()
    (two / ".step-0000000007.partial" / "state.data").write_text("half")
    checkpoints = gshard_tf.CheckpointManager(two)
    checkpoints.claim()
    assert not list(two.glob(".step-*"))
    assert checkpoints.steps() == [1, 2]


def test_a_step_is_written_again(two):
    """One that lacks a file, too: it was passed over, and training came by again."""
    (two / "step-0000000002" / "manifest.json").unlink()
    checkpoints = gshard_tf.CheckpointManager(two, asynchronous=False)
    checkpoints.save(variables(3), 2)
    state = variables(9)
    assert checkpoints.restore(state).manifest.step == 2
    assert_values(state, 3)


def test_a_step_moved_to_another_disk_is_kept_there(two, tmp_path_factory):
    disk = tmp_path_factory.mktemp("disk")
    shutil.move(two / "step-0000000001", disk / "one")
    (two / "step-0000000001").symlink_to(disk / "one")
    checkpoints = gshard_tf.CheckpointManager(two, max_to_keep=1, asynchronous=False)
    state = variables(9)
    checkpoints.restore(state, step=1)
    assert_values(state, 1)
    checkpoints.save(variables(3), 3)
    assert checkpoints.steps() == [3]
    assert (disk / "one" / "manifest.json").is_file()


def test_hidden_folders_of_others_stay(two):
    mine = two / ".step-mine.partial"
    mine.mkdir()
    (mine / "thesis").write_text("years of work")
    gshard_tf.CheckpointManager(two).claim()
    assert (mine / "thesis").exists()


@pytest.mark.parametrize("kind", ["file", "link"])
def test_a_folder_that_is_none(tmp_path, kind):
    place = tmp_path / "run"
    place.write_text("mine") if kind == "file" else place.symlink_to("nowhere")
    with pytest.raises(FileExistsError, match="Name another folder"):
        gshard_tf.CheckpointManager(place).claim()


@pytest.mark.parametrize("kind", ["notes", "file", "link"])
def test_what_is_in_the_way_of_a_step_stays(two, tmp_path_factory, kind):
    """A user's notes beside the files, a file or a link of the step's name."""
    step = two / "step-0000000002"
    if kind == "notes":
        (step / "notes.txt").write_text("mine")
    else:
        shutil.rmtree(step)
        other = tmp_path_factory.mktemp("other") / "mine"
        other.write_text("mine")
        step.write_text("mine") if kind == "file" else step.symlink_to(other.parent)
    mine = {"notes": step / "notes.txt", "file": step, "link": step / "mine"}[kind]
    with pytest.raises(FileExistsError, match="step-0000000002|other"):
        gshard_tf.CheckpointManager(two, asynchronous=False).save(variables(3), 2)
    assert mine.read_text() == "mine"
    assert step.is_symlink() == (kind == "link")


def test_a_checkpoint_of_another_model(two):
    state = variables(9)
    state["model/c"] = state.pop("model/a")
    with pytest.raises(
        CheckpointMismatchError, match="not in the checkpoint: model/c"
    ) as error:
        gshard_tf.CheckpointManager(two).restore(state)
    assert "not in the model: model/a" in str(error.value)
    assert_values(state, 9)
    # What may differ is named.
    found = gshard_tf.CheckpointManager(two).restore(
        state, missing=["model/c"], extra=["model/a"]
    )
    assert found.match.missing == ("model/c",) and found.match.extra == ("model/a",)
    assert np.all(state.pop("model/c").numpy() == 9)
    assert_values(state, 2)
    for wrong in (
        tf.Variable(np.zeros([3, 4], "float32")),
        tf.Variable(np.zeros([4, 3])),
    ):
        with pytest.raises(CheckpointMismatchError, match="model/a"):
            gshard_tf.CheckpointManager(two).restore(variables() | {"model/a": wrong})


def test_renaming(two):
    state = {"model/x/kernel": tf.Variable(np.zeros([4, 3], "float32"))}
    gshard_tf.CheckpointManager(two).restore(
        state, rename=[(r"model/(\w+)/kernel", "model/a")], extra=[".*"]
    )
    assert_values(state, 2)


@pytest.mark.parametrize(
    "arguments", [{"max_to_keep": 0}, {"max_to_keep": True}, {"mode": "most"}], ids=str
)
def test_wrong_arguments(tmp_path, arguments):
    with pytest.raises(ValueError, match="Received"):
        gshard_tf.CheckpointManager(tmp_path, **arguments)


def test_a_model_that_is_not_built():
    with pytest.raises(ValueError, match="not built"):
        gshard_tf.training_state(keras.Sequential([keras.layers.Dense(1)]))
