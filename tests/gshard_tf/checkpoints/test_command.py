"""`gshard-checkpoints` on a terminal: lines that fit, and readers that leave."""

import os
import subprocess
import sys

import pytest
import tensorflow as tf
from processes import PYTHONPATH

import gshard_tf
from gshard_tf.checkpoints.cli import main

LOGS = {f"moe_{i}_max_load": float(i) for i in range(12)} | {"loss": 2.5, "val_loss": 3}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    manager = gshard_tf.CheckpointManager(folder)
    state = {f"a{i}": tf.Variable(tf.zeros([2])) for i in range(3)}
    manager.save(state, step=1, epoch=1, logs=LOGS)
    manager.close()
    return str(folder)


@pytest.mark.parametrize("columns", [72, 80, 120])
def test_a_line_fits_and_begins_with_losses(columns, folder, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    assert main(["list", folder]) == 0
    [line] = capsys.readouterr().out.splitlines()
    assert len(line) <= columns
    assert line.index("loss=2.5") < line.index("more")
    shown = line.count("=")  # of the metrics, since there is no mesh
    assert line.endswith(f"  +{len(LOGS) - shown} more")


def test_show_has_every_metric(folder, capsys):
    assert main(["show", folder]) == 0
    lines = capsys.readouterr().out.splitlines()
    for name, value in LOGS.items():
        assert f"  {name}={value:g}" in lines


def test_a_reader_that_leaves_is_no_error(folder):
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-m", "gshard_tf.checkpoints.cli", "show", folder],
        env={"PYTHONPATH": PYTHONPATH},
        stdout=writing,
        stderr=subprocess.PIPE,
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, b"")
