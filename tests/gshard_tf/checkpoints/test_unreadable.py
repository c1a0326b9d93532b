"""Checkpoints that cannot be read are passed over; those that were pruned, skipped."""

import errno
import os
import shutil
import tempfile
import warnings
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from processes import forked

import gshard_tf
from gshard_tf.checkpoints import step_folders, tensor_bundle
from gshard_tf.checkpoints.cli import main as command
from gshard_tf.checkpoints.errors import CorruptCheckpointError
from gshard_tf.checkpoints.manifest import Manifest

# Reading it where nothing is mapped is an input/output error, of the system itself.
BROKEN = "/proc/self/mem"


def variables(value=0.0):
    return {"model/a": tf.Variable(np.full([40, 30], value, "float32"))}


@pytest.fixture
def two(tmp_path):
    """The checkpoints of steps 1 and 2, all ones and all twos."""
    checkpoints = gshard_tf.CheckpointManager(tmp_path, asynchronous=False)
    for step in (1, 2):
        checkpoints.save(variables(step), step, logs={"loss": float(step)})
    checkpoints.close()
    return tmp_path


def be_a_file(path):
    shutil.rmtree(path)
    path.write_text("mine")


def be_a_dangling_link(path):
    shutil.rmtree(path)
    path.symlink_to("nowhere")


def be_a_link_to_itself(path):
    shutil.rmtree(path)
    path.symlink_to(path.name)


def manifest_on_a_broken_disk(path):
    (path / "manifest.json").unlink()
    (path / "manifest.json").symlink_to(BROKEN)


def manifest_is_a_folder(path):
    (path / "manifest.json").unlink()
    (path / "manifest.json").mkdir()


def deep_json(path):
    (path / "manifest.json").write_text("[" * 100_000)


def deep_json_that_ends(path):
    (path / "manifest.json").write_text("[" * 100_000 + "]" * 100_000)


def a_long_number(path):
    (path / "manifest.json").write_text("9" * 10_000)


def of_another_step(path):
    shutil.rmtree(path)
    shutil.copytree(path.with_name("step-0000000001"), path)


DAMAGES = [
    (be_a_file, "it is no folder", None),
    (be_a_dangling_link, "a link to what is not there", None),
    (be_a_link_to_itself, "a link to what is not there", None),
    (manifest_on_a_broken_disk, "Input/output error", errno.EIO),
    (manifest_is_a_folder, "manifest.json is missing", None),
    (deep_json, "RecursionError", None),
    (deep_json_that_ends, "RecursionError", None),
    (a_long_number, "ValueError", None),
    (of_another_step, "that of step 1", None),
]


@pytest.mark.parametrize(
    ("damage", "cause", "number"), DAMAGES, ids=[d[0].__name__ for d in DAMAGES]
)
def test_the_one_before_is_taken(two, damage, cause, number, capsys):
    newest = two / "step-0000000002"
    damage(newest)
    state = variables(9)
    with pytest.warns(UserWarning, match="Falling back") as said:
        found = gshard_tf.CheckpointManager(two).restore(state)
    assert found.manifest.step == 1
    assert np.all(state["model/a"].numpy() == 1)
    assert len(said) == 1
    assert str(newest) in str(said[0].message) and cause in str(said[0].message)
    with pytest.raises(CorruptCheckpointError, match=cause) as caught:
        gshard_tf.CheckpointManager(two).restore(state, step=2)
    assert caught.value.errno == number
    assert command(["list", str(two)]) == 1
    assert f"DAMAGED: {newest}" in capsys.readouterr().out
    # And where none is left.
    shutil.rmtree(two / "step-0000000001")
    with pytest.warns(UserWarning), pytest.raises(CorruptCheckpointError) as caught:
        gshard_tf.CheckpointManager(two).restore(state)
    assert caught.value.errno == number and str(two) in str(caught.value)


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become somebody else")
@pytest.mark.parametrize("which", ["", "manifest.json", "state.index"])
def test_a_missing_permission_is_damage(two, which):
    with tempfile.TemporaryDirectory() as open_to_all:
        os.chmod(open_to_all, 0o755)
        step = shutil.copytree(two / "step-0000000002", Path(open_to_all, "step"))
        (step / which).chmod(0)
        said = forked(_read_as_nobody, step)
    assert said.startswith(f"{errno.EACCES} {step} is damaged: ")
    assert which in said and "cannot be read (Permission denied)" in said


def _read_as_nobody(step):
    os.setuid(65534)
    try:
        return Manifest.read(step)
    except CorruptCheckpointError as error:
        return f"{error.errno} {error}"


def test_arrays_on_a_broken_disk(two):
    """TensorFlow's own error: what it says, with the number of the system."""
    step = two / "step-0000000002"
    [data] = step.glob("state.data*")
    data.unlink()
    data.symlink_to(BROKEN)
    with pytest.raises(
        CorruptCheckpointError, match="step-0000000002 is damaged: 'model/a'"
    ) as e:
        tensor_bundle.read(
            step / "state", "model/a", (40, 30), ((0, 40), (0, 30)), tf.float32
        )
    assert e.value.errno == errno.EIO and "Input/output error" in str(e.value)


def test_a_process_with_too_many_files_calls_nothing_damaged(two, monkeypatch):
    def no_more(path):
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr("gshard_tf.checkpoints.manifest.sha256", no_more)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(OSError, match="could not be read.*Too many open") as caught:
            gshard_tf.CheckpointManager(two).restore(variables())
    assert caught.value.errno == errno.EMFILE


def test_a_folder_that_cannot_be_listed(two, monkeypatch, capsys):
    """Never a run that begins anew: the checkpoints are there."""

    def broken(path):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(step_folders.os, "listdir", broken)
    with pytest.raises(OSError, match="cannot be listed") as caught:
        gshard_tf.CheckpointManager(two).restore(variables())
    assert caught.value.errno == errno.EIO and str(two) in str(caught.value)
    assert command(["list", str(two)]) == 2
    assert "cannot be listed" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["step-00000000002", "step-٠٠٠٠٠٠٠٠٠٧", "step-7"])
def test_names_that_are_no_steps(two, name):
    (two / name).mkdir()
    assert gshard_tf.CheckpointManager(two).steps() == [1, 2]


def save(folder, step, value, keep=1):
    checkpoints = gshard_tf.CheckpointManager(
        folder, max_to_keep=keep, asynchronous=False
    )
    checkpoints.save(variables(value), step)
    checkpoints.close()


@pytest.mark.parametrize("newer", [3, 2])
def test_a_reader_beside_a_run_that_prunes(two, newer):
    """What it had begun to read is removed, or written again: it lists anew."""
    calls = []

    def accept(manifest):
        calls.append(manifest.step)
        if len(calls) == 1:
            save(two, newer, 5)

    state = variables(9)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = gshard_tf.CheckpointManager(two).restore(state, accept=accept)
    assert found.manifest.step == newer and calls == [2, newer]
    assert np.all(state["model/a"].numpy() == 5)


def test_a_step_that_was_asked_for_and_is_pruned(two):
    def accept(manifest):
        save(two, 3, 3)

    with pytest.raises(FileNotFoundError, match="There is no checkpoint.*-0000000002"):
        gshard_tf.CheckpointManager(two).restore(variables(), step=2, accept=accept)


def test_a_list_beside_a_run_that_prunes(two, monkeypatch, capsys):
    read, calls = Manifest.read, []

    def late(path, step=None):
        calls.append(step)
        if len(calls) == 1:
            save(two, 3, 3)
        return read(path, step)

    monkeypatch.setattr(Manifest, "read", late)
    assert command(["list", str(two)]) == 0
    assert "step          3" in capsys.readouterr().out
    assert calls == [1, 2, 3]


def test_the_best_is_kept_where_the_disk_does_not_answer(two):
    best = two / "step-0000000001"
    manifest_on_a_broken_disk(best)
    checkpoints = gshard_tf.CheckpointManager(
        two, max_to_keep=1, monitor="loss", asynchronous=False
    )
    checkpoints.save(variables(3), 3, logs={"loss": 3.0})
    assert checkpoints.steps() == [1, 2, 3]
    assert checkpoints.best() == 2


def test_what_cannot_be_removed_ends_no_run(two, monkeypatch):
    def refuse(folder, step):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(step_folders, "remove", refuse)
    checkpoints = gshard_tf.CheckpointManager(two, max_to_keep=2, asynchronous=False)
    with pytest.warns(UserWarning, match="0000000001 is no longer needed.*Permission"):
        checkpoints.save(variables(3), 3)
    assert checkpoints.steps() == [1, 2, 3]
