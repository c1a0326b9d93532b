"""Runs whose folder or disk is disturbed."""

import os
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

from benchmarks.checkpoint import faulty_run
from benchmarks.checkpoint.fault_cases import (
    Case,
    restore,
    run,
    state_of,
)

_ROOT = Path(__file__).resolve().parents[2]
_BROKEN_DISK = Path(__file__).with_name("broken_disk.c")


def child_of_a_killed_run(place: Path) -> tuple[bool, str]:
    """A forked child lives on when its run is killed: the next run starts."""
    saved, begin = os.pipe()
    pid = os.fork()
    if pid == 0:
        children = []

        def report(line: str) -> None:
            if line.startswith("saved") and not children:
                children.append(os.fork())
                if children == [0]:
                    os.write(begin, f"{os.getpid()}\n".encode())
                    time.sleep(600)
                    os._exit(0)

        faulty_run.run(place, 1000, report)
        os._exit(0)
    os.close(begin)
    child = int(os.read(saved, 100) or 0)
    if not child:
        return False, "the first run ended by itself"
    time.sleep(0.2)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    try:
        os.kill(child, 0)
        newest = int(sorted(place.glob("checkpoints/step-*"))[-1].name[5:])
        events: list[str] = []
        epochs = newest // faulty_run.STEPS_PER_EPOCH + 1
        faulty_run.run(place, epochs, events.append)
        os.kill(child, 0)  # it lives still
    finally:
        os.kill(child, signal.SIGKILL)
    return events[0] == f"restored {newest}", f"with the child alive, it {events[0]}"


def remote_folder(place: Path) -> tuple[bool, str]:
    """Refused before any work, and nothing is written to a folder `gs:`."""
    import gshard_tf

    os.chdir(place)
    try:
        gshard_tf.CheckpointCallback("gs://bucket/run", save_every=1)
    except ValueError as error:
        return not list(place.iterdir()), f"ValueError: {error}"
    return False, "nothing was said of a remote folder"


def folder_removed(place: Path) -> tuple[bool, str]:
    """The run says so, makes it again, and ends as one that was not disturbed."""
    whole = run(place / "whole", epochs=2)
    refused: list[str] = []

    def report(line: str) -> None:
        if line == f"step {faulty_run.EVERY + 2}":
            shutil.rmtree(place / "run" / "checkpoints")
            refused.append(_second_run(place / "run" / "checkpoints"))

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        end = faulty_run.run(place / "run", 2, report)
    warned = [str(w.message) for w in caught if "was removed" in str(w.message)]
    right = (
        end == whole
        and len(warned) == 1
        and refused[0].startswith("AlreadyRunningError")
        and restore(place / "run", faulty_run.model())[0]
        == 2 * faulty_run.STEPS_PER_EPOCH
    )
    return right, f"{warned} A second run: {refused}"


def _second_run(folder: Path) -> str:
    """Returns the error of another process that claims a folder; "" for none."""
    code = (
        "import sys, gshard_tf\n"
        "try: gshard_tf.CheckpointManager(sys.argv[1]).claim()\n"
        "except Exception as error: print(type(error).__name__, error, sep=': ')"
    )
    command = [sys.executable, "-c", code, str(folder)]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip()


def another_steps_manifest(place: Path) -> tuple[bool, str]:
    """The newest has the name of one step and the contents of another."""
    run(place)
    newest, previous = sorted((place / "checkpoints").glob("step-*"))[::-1][:2]
    expected = state_of(int(previous.name[5:]), place)
    os.rename(newest, newest.with_name("step-0000000999"))
    model = faulty_run.model()
    step, message = restore(place, model)
    right = step == int(previous.name[5:]) and faulty_run.digest(model) == expected
    return right and f"that of step {int(newest.name[5:])}" in message, message


def missing_permission(place: Path) -> tuple[bool, str]:
    """The newest checkpoint is somebody else's, who lets nobody read its data."""
    if os.getuid() != 0:
        return True, "not tried: only root can become somebody else"
    run(place)
    newest, previous = sorted((place / "checkpoints").glob("step-*"))[::-1][:2]
    model = faulty_run.model()
    restore(place, model)  # as root: loads the modules that nobody cannot read
    expected = state_of(int(previous.name[5:]), place)
    [data] = newest.glob("state.data*")
    data.chmod(0)
    for path in (place, place.parent):
        path.chmod(0o755)
    os.seteuid(65534)
    try:
        step, message = restore(place, model)
    finally:
        os.seteuid(0)
    right = step == int(previous.name[5:]) and faulty_run.digest(model) == expected
    return right and "Permission denied" in message, message


def broken_disk(place: Path) -> tuple[bool, str]:
    """Each file of the newest checkpoint fails to open, then to be read (EIO)."""
    compiler = shutil.which("cc")
    if compiler is None:
        return True, "not tried: there is no C compiler (cc) for the library"
    run(place)
    newest, previous = sorted((place / "checkpoints").glob("step-*"))[::-1][:2]
    library = place / "broken_disk.so"
    command = [compiler, "-shared", "-fPIC", "-o", library, _BROKEN_DISK, "-ldl"]
    subprocess.run(list(map(str, command)), check=True, capture_output=True)
    messages = []
    for call in ("open", "read"):
        for path in sorted(newest.iterdir()):
            env = {
                "LD_PRELOAD": str(library),
                "EIO_ON": f"{newest.name}/{path.name}",
                "EIO_CALL": call,
            }
            right, words = _in_a_new_process(
                place, int(previous.name[5:]), "Input/output error", env
            )
            messages.append(f"{call} {path.name}: {words}")
            if not right:
                return False, messages[-1]
    return True, f"{len(messages)} times, such as {messages[-1]}"


def _in_a_new_process(
    place: Path, step: int, cause: str, env: dict[str, str]
) -> tuple[bool, str]:
    """Checks that a restore there gives `step`, with one warning of the cause."""
    code = (
        "import sys; from pathlib import Path; import gshard_tf\n"
        "from benchmarks.checkpoint import fault_cases, faulty_run\n"
        "gshard_tf.request_cpu_devices(4)\n"
        "print(*fault_cases.restore(Path(sys.argv[1]), faulty_run.model()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(place)],
        env=os.environ | {"PYTHONPATH": str(_ROOT)} | env,
        capture_output=True,
        text=True,
    )
    line = (done.stdout.strip().splitlines() or [done.stderr[-300:]])[-1]
    right = line.startswith(f"{step} ") and line.count("Falling back") == 1
    return right and cause in line, line


CASES: dict[str, Case] = {
    "child of a killed run": child_of_a_killed_run,
    "folder removed": folder_removed,
    "remote folder": remote_folder,
    "manifest of another step": another_steps_manifest,
    "missing permission": missing_permission,
    "broken disk": broken_disk,
}
