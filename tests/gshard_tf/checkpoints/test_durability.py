"""What is on the disk when, and what a death in between leaves."""

import json
import os
import shutil

import numpy as np
import pytest
import tensorflow as tf

import gshard_tf
from gshard_tf.checkpoints import step_folders, tensor_bundle, writer
from gshard_tf.sharding.regions import whole


def state(value=1.0):
    return {
        "model/a": tf.Variable(np.full([4, 3], value, "float32")),
        "model/b": tf.Variable(np.full([600], float(value))),
    }


class Disk:
    """Notes what is flushed and what is given its name, in their order."""

    def __init__(self, monkeypatch):
        self.events = []
        for name in ("rename", "replace"):
            self._spy(monkeypatch, name)
        flush = os.fsync

        def fsync(descriptor):
            flush(descriptor)
            self.events.append(("flushed", os.readlink(f"/proc/self/fd/{descriptor}")))

        monkeypatch.setattr(os, "fsync", fsync)

    def _spy(self, monkeypatch, name):
        original = getattr(os, name)

        def moved(source, target):
            original(source, target)
            self.events.append(("named", str(source), str(target)))

        monkeypatch.setattr(os, name, moved)

    def flushed(self, start=0, stop=None):
        return {event[1] for event in self.events[start:stop] if event[0] == "flushed"}

    def named(self, target):
        """When a path got its name for the first time, and what it was before."""
        return next(
            (when, event[1])
            for when, event in enumerate(self.events)
            if event[0] == "named" and event[2] == str(target)
        )


def test_all_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    disk = Disk(monkeypatch)
    checkpoints = gshard_tf.CheckpointManager(tmp_path, asynchronous=False)
    checkpoints.save(state(), 1)
    path = checkpoints.path(1)
    published, partial = disk.named(path)
    manifest, written = disk.named(f"{partial}/manifest.json")
    arrays = {f"{partial}/{p.name}" for p in path.iterdir() if p.name[:5] == "state"}
    assert len(arrays) == 2  # the index and the data
    # The manifest vouches for the arrays, and its name for the manifest.
    assert arrays | {written} <= disk.flushed(stop=manifest)
    assert partial in disk.flushed(manifest, published)
    # `save` returns when the name itself would outlive a power cut.
    assert str(tmp_path) in disk.flushed(published)


def test_a_part_is_on_the_disk_before_its_process_says_so(tmp_path, monkeypatch):
    disk = Disk(monkeypatch)

    class Second:
        """Two processes, of which this is the second."""

        count, index, is_chief = 2, 1, False

        def get(self, key, timeout):
            return json.dumps({"error": ""})

        def put(self, key, text):
            disk.events.append(("said", key, json.loads(text)["error"]))

    monkeypatch.setattr(writer, "group", Second)
    (tmp_path / ".step.partial").mkdir()
    value = np.ones([4, 3], "float32")
    pieces = [tensor_bundle.ArrayShard("model/a", (4, 3), whole((4, 3)), value)]
    writer.write(tmp_path / "step", None, pieces, 7)
    said = disk.events.index(("said", "checkpoint/7/part/1", ""))
    parts = {
        str(path) for path in tensor_bundle.files(tmp_path / ".step.partial/part-00001")
    }
    assert len(parts) == 2
    assert parts <= disk.flushed(stop=said)


def test_half_of_a_removed_checkpoint_is_none(tmp_path, monkeypatch):
    checkpoints = gshard_tf.CheckpointManager(tmp_path, asynchronous=False)
    checkpoints.save(state(), 1)

    def die(path, ignore_errors=False):
        if not ignore_errors:
            os.unlink(os.path.join(path, "state.index"))
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(shutil, "rmtree", die)
        with pytest.raises(KeyboardInterrupt):
            step_folders.remove(tmp_path, 1)
    assert checkpoints.steps() == []


def test_a_name_that_begins_like_a_step_is_none(tmp_path):
    checkpoints = gshard_tf.CheckpointManager(tmp_path, asynchronous=False)
    checkpoints.save(state(), 1)
    shutil.copytree(checkpoints.path(1), tmp_path / "step-0000000002.copy")
    assert checkpoints.steps() == [1]


def test_damaged_checkpoints_do_not_push_sound_ones_out(tmp_path):
    checkpoints = gshard_tf.CheckpointManager(
        tmp_path, max_to_keep=2, asynchronous=False
    )
    for step in (1, 2):
        checkpoints.save(state(step), step)
    (checkpoints.path(2) / "state.index").write_bytes(b"")
    with pytest.warns(UserWarning, match="Falling back"):
        assert checkpoints.restore(state(), None).manifest.step == 1
    checkpoints.save(state(3), 3)
    assert checkpoints.steps() == [1, 2, 3]
