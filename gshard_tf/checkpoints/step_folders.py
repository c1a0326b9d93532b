"""The folders of a run's checkpoints, `step-NNNNNNNNNN`: listed, not read."""

import os
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from gshard_tf.io.atomic_files import sync

T = TypeVar("T")

_NAME = re.compile(r"step-([0-9]{10,})")
_HIDDEN = re.compile(r"\.step-[0-9]{10,}\.partial")


def steps(folder: Path) -> list[int]:
    """Returns the steps that have a complete checkpoint, oldest first.

    Raises:
        OSError: when the folder cannot be read.
    """
    try:
        if not folder.is_dir():
            return []
        names = os.listdir(folder)
    except FileNotFoundError:  # removed just now
        return []
    except OSError as error:
        raise OSError(
            error.errno,
            f"The checkpoints in {folder} cannot be listed ({error.strerror})",
        ) from error
    numbers = {int(name[1]) for name in map(_NAME.fullmatch, names) if name}
    return sorted(step for step in numbers if step_path(folder, step).name in names)


def read_listed(
    listed: Callable[[], Sequence[int]], read: Callable[[int], T]
) -> dict[int, T]:
    """Reads each checkpoint while the run may continue; returns the results by step.

    Such a run removes some meanwhile, and writes others: so the steps are listed again
    until all of them are read. Those that are gone by then are left out.
    """
    results: dict[int, T] = {}
    while True:
        now = listed()
        unread = [step for step in now if step not in results]
        if not unread:
            return {step: results[step] for step in now}
        for step in unread:
            results[step] = read(step)


def is_named(path: Path) -> bool:
    """Returns whether a name exists, also as a link that leads nowhere.

    (`os.path.lexists` returns False where the disk does not answer.)
    """
    return identity(path) is not None


def identity(path: Path) -> tuple[int, ...] | None:
    """Returns what distinguishes a folder from its replacement; None: it is absent."""
    try:
        status = os.lstat(path)
    except FileNotFoundError:
        return None
    except OSError:  # reading it will raise the same
        return ()
    return status.st_dev, status.st_ino, status.st_mtime_ns


def step_path(folder: Path, step: int) -> Path:
    """Returns the folder of a step's checkpoint."""
    return folder / f"step-{step:010d}"


def leftovers(folder: Path) -> list[Path]:
    """Returns the leftovers of killed runs: steps half-written, or half-removed.

    Raises:
        FileExistsError: when one is no folder, so a file of the user's, and would be in
            the way once that step comes.
    """
    paths = [path for path in folder.iterdir() if _HIDDEN.fullmatch(path.name)]
    for path in paths:
        if path.is_symlink() or not path.is_dir():
            raise FileExistsError(
                f"{path} is no folder, and must not be in the way of a checkpoint. "
                "Move it elsewhere, or name another folder for the run."
            )
    return paths


def remove(folder: Path, step: int) -> None:
    """Removes a step's checkpoint, or only the link in its place."""
    path = step_path(folder, step)
    if path.is_symlink():
        path.unlink()
        return
    # Absent at once, whatever happens while it is being removed.
    hidden = path.with_name(f".{path.name}.partial")
    shutil.rmtree(hidden, ignore_errors=True)
    os.rename(path, hidden)
    sync(folder)
    shutil.rmtree(hidden)
