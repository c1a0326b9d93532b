"""Faults of disk, files and model, and the error that a run raises for each."""

import contextlib
import json
import os
import random
import signal
import subprocess
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.checkpoint import faulty_run

FLIPS = 60


Case = Callable[[Path], tuple[bool, str]]


def try_case(name: str, case: Case, folder: Path) -> dict[str, Any]:
    """Runs one case in a process of its own.

    Args:
        name: What it is called.
        case: Given a folder of its own; returns what `right` and `says` are.
        folder: Where that folder is made.

    Returns:
        `right`: whether it ended with a clear error or the previous good checkpoint,
        and never with a wrong restore; `says`: what it said.
    """
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            place = folder / f"case-{name.replace(' ', '-')}"
            place.mkdir()
            right, says = case(place)
        except BaseException as error:  # a case that fails is a finding
            right, says = False, repr(error)
        with os.fdopen(writing, "w") as pipe:
            pipe.write(json.dumps({"right": right, "says": says}))
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        text = pipe.read()
    os.waitpid(pid, 0)
    return json.loads(text or '{"right": false, "says": "the process died"}')


def run(place: Path, epochs: int = 1) -> str:
    return faulty_run.run(place, epochs, lambda line: None)


def state_of(step: int, place: Path) -> str:
    """The digest of a checkpoint, restored into a new model."""
    import gshard_tf

    model = faulty_run.model()
    gshard_tf.CheckpointManager(place / "checkpoints").restore(
        gshard_tf.training_state(model), step=step
    )
    return faulty_run.digest(model)


def restore(place: Path, model: Any) -> tuple[int | None, str]:
    """Restores the newest sound checkpoint: its step, or None and the error."""
    import gshard_tf

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            restored = gshard_tf.CheckpointManager(place / "checkpoints").restore(
                gshard_tf.training_state(model), dataset=faulty_run.data()
            )
        except (ValueError, OSError) as error:
            return None, f"{type(error).__name__}: {error}"
    warned = [str(w.message) for w in caught if "Falling back" in str(w.message)]
    return restored.manifest.step, " ".join(warned)


def _damaged(place: Path, damage: Callable[[Path], None]) -> tuple[bool, str]:
    """Damages the newest checkpoint: the one before it must be restored."""
    run(place)
    newest, previous = sorted((place / "checkpoints").glob("step-*"))[::-1][:2]
    expected = state_of(int(previous.name[5:]), place)
    damage(newest)
    model = faulty_run.model()
    step, message = restore(place, model)
    right = (
        step == int(previous.name[5:])
        and faulty_run.digest(model) == expected
        and bool(message)
    )
    return right, message


def _flip(path: Path, at: int, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1 << bit
    path.write_bytes(content)


def flipped_bytes(place: Path) -> tuple[bool, str]:
    """One bit of any file, at many places, one after the other."""
    run(place)
    newest, previous = sorted((place / "checkpoints").glob("step-*"))[::-1][:2]
    steps = [int(path.name[5:]) for path in (newest, previous)]
    digests = [state_of(step, place) for step in steps]
    rng = random.Random(1)  # noqa: S311
    files = sorted(newest.iterdir())
    fell_back, harmless = 0, 0
    for i in range(FLIPS):
        path = files[i % len(files)]
        at, bit = rng.randrange(path.stat().st_size), rng.randrange(8)
        _flip(path, at, bit)
        model = faulty_run.model()
        step, message = restore(place, model)
        _flip(path, at, bit)
        if step == steps[1] and faulty_run.digest(model) == digests[1]:
            fell_back += 1
        elif step == steps[0] and faulty_run.digest(model) == digests[0]:
            harmless += 1
        else:
            return False, f"bit {bit} of byte {at} of {path.name}: {step} {message}"
    return True, (
        f"{FLIPS} single bits in {len(files)} files: {fell_back} fell back to the "
        f"checkpoint before, {harmless} changed nothing that is read"
    )


def truncated_shard(place: Path) -> tuple[bool, str]:
    def damage(newest: Path) -> None:
        [data] = newest.glob("state.data*")
        os.truncate(data, data.stat().st_size // 2)

    return _damaged(place, damage)


def missing_shard(place: Path) -> tuple[bool, str]:
    return _damaged(place, lambda newest: next(newest.glob("state.data*")).unlink())


def missing_manifest(place: Path) -> tuple[bool, str]:
    return _damaged(place, lambda newest: (newest / "manifest.json").unlink())


def all_damaged(place: Path) -> tuple[bool, str]:
    """Then there is an error, and the model is as it was."""
    run(place)
    for data in (place / "checkpoints").glob("step-*/state.data*"):
        _flip(data, data.stat().st_size // 2, 0)
    model = faulty_run.model()
    before = faulty_run.digest(model)
    step, message = restore(place, model)
    return step is None and faulty_run.digest(model) == before, message


def another_model(place: Path) -> tuple[bool, str]:
    """A checkpoint of another model: an error that says what differs."""
    run(place)
    model = faulty_run.model(width=12)
    before = faulty_run.digest(model)
    step, message = restore(place, model)
    right = (
        step is None and faulty_run.digest(model) == before and "has shape" in message
    )
    return right, message


def two_runs_in_one_folder(place: Path) -> tuple[bool, str]:
    """The second one is refused, and the first continues."""
    pid = os.fork()
    if pid == 0:
        run(place, epochs=1000)
        os._exit(0)
    try:
        deadline = time.monotonic() + 120
        while not list(place.glob("checkpoints/step-*")):
            if time.monotonic() > deadline:
                return False, "the first run wrote nothing"
            time.sleep(0.1)
        try:
            run(place)
        except Exception as error:  # which one is what the case is about
            message = f"{type(error).__name__}: {error}"
        else:
            return False, "the second run was not refused"
        seen = sorted(place.glob("checkpoints/step-*"))[-1]
        time.sleep(2)
        going_on = sorted(place.glob("checkpoints/step-*"))[-1] > seen
        return "AlreadyRunning" in message and going_on, message
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


@contextlib.contextmanager
def _small_disk(place: Path, kilobytes: int) -> Iterator[Path]:
    """A file system of its own, which only root can make."""
    disk = place / "disk"
    disk.mkdir()
    size = f"size={kilobytes}k"
    command = ["mount", "-t", "tmpfs", "-o", size, "tmpfs", str(disk)]
    subprocess.run(command, check=True, capture_output=True)
    try:
        yield disk
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=False)


def full_disk(place: Path) -> tuple[bool, str]:
    """An error; the checkpoint before is whole, and the run resumes with more room."""
    with _small_disk(place, 700) as disk:
        run(disk)
        with contextlib.suppress(OSError), open(disk / "filler", "wb") as file:
            while True:
                file.write(bytes(1024))
                file.flush()
        try:
            run(disk, epochs=2)
        except OSError as error:
            message = f"{type(error).__name__}: {error}"
        else:
            return False, "nothing was said of the full disk"
        step, _ = restore(disk, faulty_run.model())
        hidden = [p.name for p in (disk / "checkpoints").glob(".step-*")]
        (disk / "filler").unlink()
        whole = run(place / "whole", epochs=2)
        right = step == faulty_run.STEPS_PER_EPOCH and not hidden
        return right and run(disk, epochs=2) == whole, message


def read_only_folder(place: Path) -> tuple[bool, str]:
    """An error before the first step."""
    with _small_disk(place, 700) as disk:
        (disk / "checkpoints").mkdir()
        remount = ["mount", "-o", "remount,ro", str(disk)]
        subprocess.run(remount, check=True, capture_output=True)
        try:
            run(disk)
        except OSError as error:
            return "checkpoints" in str(error), f"{type(error).__name__}: {error}"
        return False, "nothing was said of the read-only folder"


CASES: dict[str, Case] = {
    "full disk": full_disk,
    "read-only folder": read_only_folder,
    "flipped bytes": flipped_bytes,
    "truncated shard": truncated_shard,
    "missing shard": missing_shard,
    "missing manifest": missing_manifest,
    "all damaged": all_damaged,
    "another model": another_model,
    "two runs in one folder": two_runs_in_one_folder,
}
