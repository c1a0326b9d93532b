"""The folder of a run: whose it is, and what becomes of it meanwhile."""

import os
import shutil

import numpy as np
import pytest
import tensorflow as tf
from processes import forked, left_by_a_killed_process

import gshard_tf
from gshard_tf.checkpoints import manager
from gshard_tf.checkpoints.writer import write


def variables(value=0.0):
    return {"model/a": tf.Variable(np.full([4, 3], value, "float32"))}


def restored(folder):
    state = variables(-1)
    found = gshard_tf.CheckpointManager(folder).restore(state)
    assert np.all(state["model/a"].numpy() == found.manifest.step)
    return found.manifest.step


@pytest.fixture
def run(tmp_path):
    """The checkpoints of a run in a folder that can be removed; step 1 is written."""
    checkpoints = gshard_tf.CheckpointManager(tmp_path / "run", asynchronous=False)
    checkpoints.save(variables(1), 1)
    yield checkpoints
    checkpoints.close()


def test_a_killed_run_is_given_again_while_a_child_of_it_lives(tmp_path):
    def begin():
        checkpoints = gshard_tf.CheckpointManager(tmp_path / "run")
        checkpoints.claim()
        return checkpoints

    with left_by_a_killed_process(begin):
        gshard_tf.CheckpointManager(tmp_path / "run").claim()


def test_a_child_does_not_write_beside_its_parent(run):
    said = forked(run.save, variables(2), 2)
    assert said.startswith("AlreadyRunningError")
    assert f"process {os.getpid()} on" in said and str(run.directory) in said
    run.save(variables(3), 3)
    assert run.steps() == [1, 3]


def test_two_names_of_a_folder_in_one_process(run, tmp_path):
    """As one name: the second goes on where an interrupted `fit` was."""
    (tmp_path / "link").symlink_to("run")
    other = gshard_tf.CheckpointManager(tmp_path / "link", asynchronous=False)
    other.save(variables(2), 2)
    assert run.steps() == [1, 2]
    said = forked(gshard_tf.CheckpointManager(tmp_path / "run").claim)
    assert said.startswith("AlreadyRunningError")


def test_the_folder_is_removed_between_two_saves(run):
    shutil.rmtree(run.directory)
    again = gshard_tf.CheckpointManager(run.directory)
    assert forked(again.claim).startswith("AlreadyRunningError")
    with pytest.warns(UserWarning, match="was removed or replaced") as said:
        run.save(variables(2), 2)
    assert len(said) == 1 and str(run.directory) in str(said[0].message)
    run.save(variables(3), 3)
    assert run.steps() == [2, 3] and restored(run.directory) == 3
    assert forked(again.claim).startswith("AlreadyRunningError")


@pytest.mark.parametrize("background", [True, False])
def test_the_folder_is_removed_during_a_save(run, monkeypatch, background):
    run.asynchronous = background
    calls = []

    def late(path, *arguments):
        calls.append(path)
        if len(calls) == 1:
            shutil.rmtree(run.directory)
            raise FileNotFoundError(2, f"could not write {path}")
        write(path, *arguments)

    monkeypatch.setattr(manager, "write", late)
    with pytest.warns(UserWarning, match="was removed or replaced"):
        run.save(variables(2), 2)
        run.wait()
    assert len(calls) == 2 and restored(run.directory) == 2


def test_a_link_that_leads_to_another_run_meanwhile(run, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "link").symlink_to("run")
    linked = gshard_tf.CheckpointManager(tmp_path / "link", asynchronous=False)
    linked.save(variables(2), 2)
    (tmp_path / "link").unlink()
    (tmp_path / "link").symlink_to("other")

    with pytest.warns(UserWarning, match="was removed or replaced"):
        linked.save(variables(3), 3)
    assert restored(tmp_path / "other") == 3 and restored(run.directory) == 2


@pytest.mark.parametrize("kind", ["file", "link"])
def test_what_would_be_in_the_way_later_is_refused_now(tmp_path, kind):
    place = tmp_path / ".step-0000000007.partial"
    place.write_text("mine") if kind == "file" else place.symlink_to("nowhere")
    checkpoints = gshard_tf.CheckpointManager(tmp_path)
    with pytest.raises(FileExistsError, match="step-0000000007.partial is no folder"):
        checkpoints.claim()
    assert os.path.lexists(place)
    place.unlink()
    # And it holds nothing meanwhile.
    assert forked(gshard_tf.CheckpointManager(tmp_path).claim) == "None"
    checkpoints.claim()
