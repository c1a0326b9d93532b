"""One run in several processes: the same numbers, and an end together."""

import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import keras
import many_processes as many
import network_hosts
import numpy as np
import pytest
from forks import Fork
from processes import PYTHONPATH, ROOT, free_port

import gshard_tf
from gshard_tf.runtime.watchdog import ABORTED_BY_ANOTHER

SCRIPT = pathlib.Path(many.__file__)
CODE = f"import runpy; runpy.run_path({str(SCRIPT)!r}, run_name='__main__')"
STEPS = many.STEPS_PER_EPOCH * many.EPOCHS


def run(
    count, folder, *given, devices=4, patience=60, timeout=150, on=None, stopped=None
):
    """Runs `count` processes: exit codes, standard errors, seconds after 1's last step.

    `on` says where: what `network_hosts.hosts` yields. A process that stops for good is
    `stopped`: nobody waits for it.
    """
    first = "127.0.0.1" if on is None else on[0][1]
    env = os.environ | {
        "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}",
        "GSHARD_COORDINATOR": f"{first}:{free_port()}",
        "GSHARD_PROCESSES": str(count),
    }
    arguments = [devices // count, patience, folder, *given]
    started, deadline = [], time.monotonic() + timeout
    for index in range(count):
        out, err = (
            open(folder / f"{kind}-{index}.txt", "w") for kind in ("out", "err")
        )
        with out, err:
            files = {"stdout": out, "stderr": err}
            env["GSHARD_PROCESS"] = str(index)
            if on is None:
                begun = Fork(CODE, arguments, env=env, cwd=ROOT, **files)
            else:
                command = [*on[index][0], sys.executable, SCRIPT, *arguments]
                begun = subprocess.Popen([*map(str, command)], env=env, **files)
            started.append(begun)
    try:
        for index, process in enumerate(started):
            if index != stopped:
                process.wait(max(1, deadline - time.monotonic()))
    finally:
        for process in started:
            process.kill()
    codes = [process.wait() for process in started]
    errors = [(folder / f"err-{i}.txt").read_text() for i in range(count)]
    noted = folder / "losses-1.txt"
    seconds = time.time() - noted.stat().st_mtime if noted.exists() else None
    return codes, errors, seconds


def losses(folder, index=0, key="loss"):
    """What a process noted at each step."""
    noted = (folder / f"losses-{index}.txt").read_text().splitlines()
    return {step["step"]: step[key] for step in map(json.loads, noted)}


@pytest.fixture(scope="module")
def folder_of_one(tmp_path_factory):
    """What one process with four devices noted: this one."""
    folder = tmp_path_factory.mktemp("one")
    many.train(0, 4, folder, {})
    return folder


@pytest.fixture(scope="module")
def one(folder_of_one):
    """Its losses."""
    return losses(folder_of_one)


@pytest.fixture(scope="module")
def rows_of_one(folder_of_one):
    """The rows that it was fed at each step."""
    return losses(folder_of_one, key="rows")


@pytest.fixture(scope="module")
def one_whole(tmp_path_factory):
    """The same of a model that no mesh splits."""
    folder = tmp_path_factory.mktemp("one-whole")
    many.train(0, 4, folder, {"weights": "whole"})
    return losses(folder)


def assert_same_losses(folder, count, one):
    for index in range(count):
        found = losses(folder, index)
        assert list(found) == list(range(1, STEPS + 1))
        np.testing.assert_allclose(list(found.values()), list(one.values()), rtol=1e-5)


def test_two_processes_are_one(one, tmp_path):
    codes, errors, _ = run(2, tmp_path)
    assert codes == [0, 0], errors
    assert_same_losses(tmp_path, 2, one)
    # Only the first one writes to the standard output.
    assert "weights" in (tmp_path / "out-0.txt").read_text()
    assert (tmp_path / "out-1.txt").read_text() == ""
    # One process reads what two wrote.
    state = gshard_tf.training_state(many_model({}))
    found = gshard_tf.CheckpointManager(tmp_path / "checkpoints").restore(state)
    assert found.manifest.processes == 2 and found.manifest.step == STEPS


def idle_of(folder, count, step, given):
    """Which processes wrote no file, after restoring what the others wrote."""
    checkpoints = gshard_tf.CheckpointManager(folder / "checkpoints")
    manifest = checkpoints.manifest(step)
    idle = manifest.wrote_nothing or []
    assert len([name for name in manifest.files if ".data-" in name]) == (
        count - len(idle)
    )
    found = checkpoints.restore(gshard_tf.training_state(many_model(given)))
    assert found.manifest.step == step
    return idle


def test_a_process_without_a_shard_of_its_own(tmp_path):
    codes, errors, _ = run(2, tmp_path, "mesh=data", "weights=whole", "epochs=1")
    assert codes == [0, 0], errors
    assert idle_of(tmp_path, 2, 4, {"weights": "whole"}) == [1]


@pytest.mark.slow
@pytest.mark.parametrize("position", ["count", "iterator"])
@pytest.mark.parametrize("weights", ["whole", "split"])
@pytest.mark.parametrize("mesh", ["data", "expert", "both"])
@pytest.mark.parametrize("count", [2, 3, 4])
def test_every_mesh_saves_and_resumes(
    one, one_whole, tmp_path, count, mesh, weights, position
):
    given = {"mesh": mesh, "weights": weights, "position": position}
    said = [f"{key}={value}" for key, value in given.items()]
    devices = 2 * count
    for epochs in (1, 2):
        codes, errors, _ = run(
            count, tmp_path, *said, f"epochs={epochs}", devices=devices
        )
        assert codes == [0] * count, errors
    assert_same_losses(tmp_path, count, one if weights == "split" else one_whole)
    # Where weights are copied, the others have their positions in the data at most. (8
    # experts do not divide by 6 devices, and process 0 has both halves of them.)
    nothing = position == "count" and (weights == "whole" or count == 3)
    idle = [*range(1, count)] if nothing else []
    assert idle_of(tmp_path, count, STEPS, given) == idle


def many_model(given):
    model = many.classifier(given)
    model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    return model


@pytest.mark.slow
@pytest.mark.parametrize("given", [(2, "rows=own"), (4,)], ids=str)
def test_other_ways_to_be_one(one, tmp_path, given):
    count, *options = given
    codes, errors, _ = run(count, tmp_path, *options)
    assert codes == [0] * count, errors
    assert_same_losses(tmp_path, count, one)


@pytest.mark.slow
@pytest.mark.skipif(not network_hosts.possible(), reason="only root makes networks")
@pytest.mark.parametrize("count", [2, 4])
def test_hosts_of_a_network(one, tmp_path, count):
    with network_hosts.hosts(count) as on:
        codes, errors, _ = run(count, tmp_path, on=on)
    assert codes == [0] * count, errors
    assert_same_losses(tmp_path, count, one)


def assert_sigterm_loses_nothing(folder, one, count, who):
    codes, errors, seconds = run(count, folder, "do=term", "step=3", f"who={who}")
    assert codes == [os.EX_TEMPFAIL] * count, errors
    assert seconds < 30
    [step] = gshard_tf.CheckpointManager(folder / "checkpoints").steps()[-1:]
    # All leave after the same step; those that had begun one more have ended it.
    assert step < STEPS
    for index, error in enumerate(errors):
        assert f"SIGTERM: the run is saved at step {step}" in error
        assert list(losses(folder, index)) == list(range(1, step + 1))
    return step


def test_sigterm_to_one_of_two(one, tmp_path):
    assert assert_sigterm_loses_nothing(tmp_path, one, 2, "1") in (3, 4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("count", "who"), [(2, "0"), (2, "0,1"), (4, "3"), (4, "0,1,2,3")]
)
def test_sigterm_to_some_and_given_again(one, tmp_path, count, who):
    assert_sigterm_loses_nothing(tmp_path, one, count, who)
    codes, errors, _ = run(count, tmp_path)
    assert codes == [0] * count, errors
    assert_same_losses(tmp_path, count, one)  # each step once


@pytest.mark.slow
def test_a_process_that_exits_ends_all(tmp_path):
    codes, errors, seconds = run(2, tmp_path, "do=exit", "step=3", patience=100)
    assert codes == [ABORTED_BY_ANOTHER] * 2, errors
    # Both wait until both have heard, and the test sees the end of both.
    assert seconds < 10
    for error in errors:
        assert "process 0 of 2 stops: process 1 has ended, while this one" in error


@pytest.mark.slow
@pytest.mark.parametrize("who", ["0", "1"])
@pytest.mark.parametrize("do", ["die", "stop"])
def test_survivors_end_by_the_message(tmp_path, do, who):
    """Not by jax's abort, with a stack of C++."""
    dead = int(who)
    codes, errors, seconds = run(
        3,
        tmp_path,
        f"do={do}",
        f"who={who}",
        "step=3",
        devices=6,
        stopped=dead if do == "stop" else None,
    )
    assert seconds < 30
    for index in {0, 1, 2} - {dead}:
        assert codes[index] == ABORTED_BY_ANOTHER, errors[index]
        silent = (
            "first process, which coordinates" if who == "0" else "process 1 is not"
        )
        assert silent in errors[index]
        assert "*** SIGABRT" not in errors[index]
        assert "absl::" not in errors[index] and "    @   " not in errors[index]


@pytest.mark.slow
def test_an_error_on_one_host_stops_all(tmp_path):
    codes, errors, seconds = run(2, tmp_path, "do=raise", "step=3")
    assert seconds < 20
    assert codes == [ABORTED_BY_ANOTHER, 1]
    for error in errors:
        assert "process 1 of 2 failed: RuntimeError: the disk of this host" in error


@pytest.mark.slow
def test_a_hung_host_is_noticed(tmp_path):
    codes, errors, seconds = run(2, tmp_path, "do=hang", "step=3", patience=8)
    # The first process waits up to ten seconds for the others to have heard.
    assert seconds < 8 + 20
    assert 0 not in codes
    for error in errors:
        assert "has waited 8 s in step 4" in error
        assert "process 1 has not come there" in error


@dataclasses.dataclass(frozen=True)
class Change:
    """A run of `before` processes on four devices that goes on with `after`.

    `devices` are those of all processes then; `do` is what ends it at first.
    """

    before: int
    after: int
    mesh: str
    devices: int
    do: str = "die"
    who: int = 1
    rows: str = "own"
    copies: str = "none"
    mesh_before: str = "expert"

    def ends(self, folder):
        """Runs it until its end in step 3; returns the step that is saved."""
        given = [f"do={self.do}", f"who={self.who}", "step=3"]
        given += [f"rows={self.rows}", f"copies={self.copies}"]
        given += [f"mesh={self.mesh_before}"]
        codes, errors, seconds = run(self.before, folder, *given)
        assert self.before == 1 or seconds < 30
        if self.do == "term":
            assert codes == [os.EX_TEMPFAIL] * self.before, errors
        else:
            assert codes.pop(self.who) == -signal.SIGKILL
            errors.pop(self.who)
            assert codes == [ABORTED_BY_ANOTHER] * (self.before - 1), errors
            lost = "the first process, which coordinates the run, is gone"
            if self.who:
                lost = f"process {self.who} is not responding"
            assert all(lost in error for error in errors), errors
        return gshard_tf.CheckpointManager(folder / "checkpoints").steps()[-1]


CHANGES = [
    Change(2, 1, "both", 4, mesh_before="turned"),
    Change(2, 4, "both", 8),
    Change(2, 4, "expert", 4, who=0),
    Change(2, 3, "both", 6, rows="all", copies="small"),
    Change(4, 2, "data", 2, copies="small"),
    Change(4, 1, "expert", 8, rows="all"),
    Change(4, 2, "turned", 4, do="term"),
    Change(1, 4, "both", 8, do="term", who=0, copies="small"),
]


@pytest.mark.broad(len(CHANGES))
@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_a_run_goes_on_with_fewer_or_more_processes(one, rows_of_one, tmp_path, change):
    saved = change.ends(tmp_path)
    assert 2 <= saved <= 4
    for noted in tmp_path.glob("losses-*"):
        noted.unlink()
    given = [f"rows={change.rows}", f"copies={change.copies}", f"mesh={change.mesh}"]
    codes, errors, _ = run(change.after, tmp_path, *given, devices=change.devices)
    assert codes == [0] * change.after, errors
    steps = [*range(saved + 1, STEPS + 1)]
    for index in range(change.after):
        found = losses(tmp_path, index)
        assert [*found] == steps
        wanted = [one[step] for step in steps]
        np.testing.assert_allclose([*found.values()], wanted, rtol=1e-5)
    fed = [losses(tmp_path, index, "rows") for index in range(change.after)]
    for step in steps:
        if change.rows == "own":
            assert sum((rows[step] for rows in fed), []) == rows_of_one[step]
        else:
            assert [rows[step] for rows in fed] == [rows_of_one[step]] * change.after


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
def test_without_host_copies(one, tmp_path, count):
    """No process holds more than its shards, saved and restored as such."""
    codes, errors, _ = run(count, tmp_path, "copies=none", "epochs=1")
    assert codes == [0] * count, errors
    codes, errors, _ = run(count, tmp_path, "copies=none")
    assert codes == [0] * count, errors
    assert_same_losses(tmp_path, count, one)


@pytest.mark.slow
@pytest.mark.parametrize("copies", ["small", "none"])
def test_other_seeds_are_an_error(tmp_path, copies):
    codes, errors, _ = run(2, tmp_path, "seeds=differ", f"copies={copies}")
    assert 0 not in codes
    assert all("must begin with the same values" in error for error in errors)


@pytest.mark.parametrize(
    "arguments",
    [
        {"num_processes": 0},
        {"num_processes": 2, "process_id": 2},
        {"num_processes": 2, "process_id": 0},
    ],
    ids=str,
)
def test_wrong_arguments(arguments):
    with pytest.raises(ValueError, match="Received"):
        gshard_tf.initialize(**arguments)


@pytest.mark.broad(2)
@pytest.mark.parametrize("index", [0, 1])
def test_the_others_never_start(tmp_path, index):
    given = f"'127.0.0.1:{free_port()}', 2, {index}, step_timeout=1"
    code = f"import gshard_tf; gshard_tf.initialize({given})"
    env = os.environ | {"PYTHONPATH": PYTHONPATH}
    with open(tmp_path / "said", "w") as said:
        process = Fork(code, env=env, cwd=ROOT, stdout=said, stderr=said)
    status, said = process.wait(100), (tmp_path / "said").read_text()
    assert status == ABORTED_BY_ANOTHER, said
    assert f"process {index} of 2 has waited 1 s for the others" in said


def test_one_process_joins_nobody():
    group = gshard_tf.initialize()
    assert group.is_chief and group.count == 1
    batch = gshard_tf.process_local_rows((np.zeros([3, 2]),))
    assert batch[0].shape == (3, 2)
