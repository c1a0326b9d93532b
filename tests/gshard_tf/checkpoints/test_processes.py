"""One run in several processes: the same numbers, and an end together."""

import json
import os
import pathlib
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
from processes import ROOT

SCRIPT = pathlib.Path(__file__).with_name("many.py")
STEPS = 8


def port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def start(count, devices, folder, *arguments, patience=60):
    """The processes of a run of `count`, `devices` in all."""
    address = f"127.0.0.1:{port()}"
    env = os.environ | {
        "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}",
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "GSHARD_COORDINATOR": address,
        "GSHARD_PROCESSES": str(count),
    }
    started = []
    for index in range(count):
        files = [open(folder / f"{kind}-{index}.txt", "w") for kind in ("out", "err")]
        started.append(
            subprocess.Popen(
                [
                    sys.executable,
                    SCRIPT,
                    str(devices // count),
                    str(patience),
                    str(folder),
                    *map(str, arguments),
                ],
                env=env | {"GSHARD_PROCESS": str(index)},
                stdout=files[0],
                stderr=files[1],
            )
        )
    return started


def finish(started, folder, timeout=120):
    """Exit codes and what was written to the standard errors."""
    deadline = time.monotonic() + timeout
    try:
        for process in started:
            process.wait(max(1, deadline - time.monotonic()))
    finally:
        for process in started:
            process.kill()
    codes = [process.wait() for process in started]
    errors = [(folder / f"err-{i}.txt").read_text() for i in range(len(started))]
    return codes, errors


def losses(folder, index=0):
    path = folder / f"losses-{index}.txt"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return dict((row["step"], row["loss"]) for row in rows)


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """The losses of one process with four devices."""
    folder = tmp_path_factory.mktemp("one")
    codes, errors = finish(start(1, 4, folder), folder)
    assert codes == [0], errors
    return losses(folder)


@pytest.mark.parametrize("rows", ["all", "own"])
def test_two_processes_are_one(one, tmp_path, rows):
    codes, errors = finish(start(2, 4, tmp_path, f"rows={rows}"), tmp_path)
    assert codes == [0, 0], errors
    for index in range(2):
        found = losses(tmp_path, index)
        assert list(found) == list(range(1, STEPS + 1))
        np.testing.assert_allclose(list(found.values()), list(one.values()), rtol=1e-5)
    # Only the first one writes to the standard output.
    assert "weights" in (tmp_path / "out-0.txt").read_text()
    assert (tmp_path / "out-1.txt").read_text() == ""
