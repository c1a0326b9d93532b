"""Remote paths: refused with a sentence where they are given, before any work."""

import pathlib

import keras
import numpy as np
import pytest
import tensorflow as tf

import gshard_tf
from gshard_tf import export
from gshard_tf.checkpoints.cli import main as checkpoints_command
from gshard_tf.export import exporter, keras_state, runner
from gshard_tf.planning import arguments as plan_command

REMOTE = "gs://bucket/run"
SAID = r"on a disk of this machine.*copy.*Received: \w+='gs://bucket/run'"


@pytest.fixture(autouse=True)
def empty(tmp_path, monkeypatch):
    """A working folder in which nothing must appear, such as a folder `gs:`."""
    folder = tmp_path / "working"
    folder.mkdir()
    monkeypatch.chdir(folder)
    yield folder
    assert list(folder.iterdir()) == []


def must_not_be_called(*args, **kwargs):
    raise AssertionError("work was done")


@pytest.mark.parametrize(
    "remote", [REMOTE, "s3://b/run", "ram://run", "hdfs://h/run", pathlib.Path(REMOTE)]
)
def test_checkpoints(remote):
    for make in (gshard_tf.CheckpointManager, gshard_tf.CheckpointCallback):
        with pytest.raises(ValueError, match="on a disk of this machine") as caught:
            make(remote)
        assert f"Received: directory={str(remote)!r}" in str(caught.value)


def test_checkpoints_where_a_shell_would_put_them(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for given, folder in (
        ("~/run", tmp_path / "home" / "run"),
        (f"file://{tmp_path}/a%20b", tmp_path / "a b"),
    ):
        checkpoints = gshard_tf.CheckpointManager(given, asynchronous=False)
        checkpoints.save({"model/a": tf.Variable([1.0])}, 1)
        checkpoints.close()
        assert (folder / "step-0000000001" / "manifest.json").is_file()
        state = {"model/a": tf.Variable([0.0])}
        assert gshard_tf.CheckpointManager(folder).restore(state).manifest.step == 1


def test_programs_and_states(monkeypatch):
    strategy = gshard_tf.SpmdStrategy(gshard_tf.create_mesh({"data": 2}))
    with strategy.scope():
        model = keras.Sequential([keras.layers.Input([4]), keras.layers.Dense(2)])
        model.compile("sgd", "mse")
    batch = (tf.TensorSpec([8, 4]), tf.TensorSpec([8, 2]))
    program = export.step_program(model, "train", batch)
    monkeypatch.setattr(exporter.StepProgram, "_lower", must_not_be_called)
    monkeypatch.setattr(keras_state, "training_state", must_not_be_called)
    with pytest.raises(ValueError, match=SAID):
        program.save(REMOTE)
    with pytest.raises(ValueError, match=SAID):
        export.save_state(model, REMOTE)
    with pytest.raises(ValueError, match=SAID):
        export.load_state(model, REMOTE)


def test_what_needs_no_tensorflow():
    for call in (
        lambda: export.write_state(REMOTE, {"a": np.zeros(1)}),
        lambda: export.write_data(REMOTE, {"a": np.zeros(1)}),
        lambda: export.read_state(REMOTE),
        lambda: export.read_manifest(REMOTE),
        lambda: export.ArrayBatches(REMOTE, []),
    ):
        with pytest.raises(ValueError, match=SAID):
            call()


def test_plans():
    with pytest.raises(ValueError, match=SAID):
        gshard_tf.plan(must_not_be_called, "cpu:2", batch=None, cache=REMOTE)


@pytest.mark.parametrize(
    ("command", "arguments"),
    [
        (plan_command.main, ["json:loads", "--topology", "cpu:2", "--json", REMOTE]),
        (plan_command.main, ["json:loads", "--topology", "cpu:2", "--html", REMOTE]),
        (plan_command.main, ["--compare", REMOTE, "b.json"]),
        (runner.main, ["a.gshard", "--data", "data", "--out", REMOTE]),
        (runner.main, ["a.gshard", "--data", REMOTE]),
        (runner.main, ["a.gshard", "--data", "data", "--state", REMOTE]),
        (runner.main, [REMOTE, "--data", "data"]),
        (checkpoints_command, ["list", REMOTE]),
    ],
)
def test_commands(command, arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        command(arguments)
    assert caught.value.code == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "on a disk of this machine" in said and repr(REMOTE) in said
