"""Where the checkpoints of a run are, without reading them."""

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
    """The steps that have a complete checkpoint, oldest first.

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
    found = {int(name[1]) for name in map(_NAME.fullmatch, names) if name}
    return sorted(step for step in found if path_of(folder, step).name in names)


def read_listed(
    listed: Callable[[], Sequence[int]], read: Callable[[int], T]
) -> dict[int, T]:
    """What `read` makes of each checkpoint, beside a run that goes on.

    Such a run removes some meanwhile, and writes others: so what there is is listed
    again, until nothing of it is unread. What is gone by then is left out.
    """
    found: dict[int, T] = {}
    while True:
        now = listed()
        unread = [step for step in now if step not in found]
        if not unread:
            return {step: found[step] for step in now}
        for step in unread:
            found[step] = read(step)


def is_named(path: Path) -> bool:
    """Whether there is anything of a name, be it a link that leads nowhere.

    (`os.path.lexists` says no where the disk does not answer.)
    """
    return identity(path) is not None


def identity(path: Path) -> tuple[int, ...] | None:
    """What tells a folder from another one that took its name; None: there is none."""
    try:
        found = os.lstat(path)
    except FileNotFoundError:
        return None
    except OSError:  # whoever reads it will say which
        return ()
    return found.st_dev, found.st_ino, found.st_mtime_ns


def path_of(folder: Path, step: int) -> Path:
    """The folder of a step's checkpoint."""
    return folder / f"step-{step:010d}"


def leftovers(folder: Path) -> list[Path]:
    """What killed runs left: steps half-written, or half-removed.

    Raises:
        FileExistsError: when one is no folder, so nobody's but the user's, and would
            be in the way once that step comes.
    """
    found = [path for path in folder.iterdir() if _HIDDEN.fullmatch(path.name)]
    for path in found:
        if path.is_symlink() or not path.is_dir():
            raise FileExistsError(
                f"{path} is no folder, and would be in the way of a checkpoint. Move "
                "it elsewhere, or name another folder for the run."
            )
    return found


def remove(folder: Path, step: int) -> None:
    """Removes a step's checkpoint, or the link in its place and nothing behind it."""
    path = path_of(folder, step)
    if path.is_symlink():
        path.unlink()
        return
    # Absent at once, whatever happens while it is being removed.
    hidden = path.with_name(f".{path.name}.partial")
    shutil.rmtree(hidden, ignore_errors=True)
    os.rename(path, hidden)
    sync(folder)
    shutil.rmtree(hidden)
