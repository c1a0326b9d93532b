"""Whole or not at all: files and folders that appear under their name only complete.

Everything is written beside its destination, flushed to the disk, and then renamed,
which the file system does in one step.  A process that dies at any moment, by an
error, Ctrl-C, ``kill -9`` or a power cut, leaves at most a hidden ``.NAME.partial``
that nobody takes for the real thing and that the next run removes.
"""

from __future__ import annotations

import contextlib
import fcntl
import glob
import os
import shutil
from collections.abc import Iterator
from pathlib import Path


class AlreadyRunningError(RuntimeError):
    """Another process is writing the same folder."""


def sync_folder(folder: Path) -> None:
    """Flushes a folder's list of names to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_synced(path: Path, data: bytes) -> None:
    """Writes a file and waits until it is on the disk."""
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def write_file(path: str | Path, data: bytes) -> None:
    """Writes a file so that ``path`` is never seen half-written.

    Raises:
        OSError: The disk is full, or the like; ``path`` is then as it was.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    for leftover in path.parent.glob(f".{glob.escape(path.name)}.*.partial"):
        if not _is_alive(leftover.name.split(".")[-2]):
            leftover.unlink(missing_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        write_synced(partial, data)
        os.replace(partial, path)
        sync_folder(path.parent)
    except OSError as error:
        raise _not_written(path, error) from error
    finally:
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def new_folder(path: str | Path, replace: bool = False) -> Iterator[Path]:
    """Gives a hidden folder to fill, which becomes ``path`` when the block ends well.

    What an earlier, killed run left is removed first.  When the block raises (Ctrl-C
    too), the hidden folder is removed and ``path`` is as it was before.

    Args:
        path: The folder to make.
        replace: Whether a folder that is there already is replaced; it stays as it is
            until the new one is complete.

    Yields:
        The folder to write to.

    Raises:
        FileExistsError: ``path`` exists and ``replace`` is false.
        AlreadyRunningError: Another process is making the same folder.
        OSError: The disk is full, or the like.
    """
    path = Path(path).absolute()
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    replaced = path.with_name(f".{path.name}.replaced")
    lock = _lock(partial, path)
    try:
        _recover(path, replaced)
        if path.exists() and not replace:
            raise FileExistsError(
                f"{path} exists already; remove it, or ask to replace it"
            )
        _empty(partial)
        yield partial
        sync_folder(partial)
        if path.exists():
            os.rename(path, replaced)
        os.rename(partial, path)
        sync_folder(path.parent)
        shutil.rmtree(replaced, ignore_errors=True)
    except BaseException as error:
        _recover(path, replaced)
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, OSError) and not isinstance(error, FileExistsError):
            raise _not_written(path, error) from error
        raise
    finally:
        os.close(lock)


def _not_written(path: Path, error: OSError) -> OSError:
    """The same kind of error, saying what was not written; it keeps its errno."""
    reason = error.strerror or str(error)
    return type(error)(
        error.errno or 0, f"could not write {path} ({reason}); nothing was published"
    )


def _lock(partial: Path, path: Path) -> int:
    """Makes the hidden folder and locks it for as long as this process lives."""
    while True:
        partial.mkdir(exist_ok=True)
        descriptor = os.open(partial, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The folder may have been published or removed since it was opened.
            if os.path.samestat(os.fstat(descriptor), os.stat(partial)):
                return descriptor
        except BlockingIOError:
            os.close(descriptor)
            raise AlreadyRunningError(
                f"another process is writing {path} just now"
            ) from None
        except FileNotFoundError:
            os.close(descriptor)  # lost the race: try again
            continue
        os.close(descriptor)


def _recover(path: Path, replaced: Path) -> None:
    """Puts the old folder back if a run died between the two renames."""
    if replaced.exists():
        if path.exists():
            shutil.rmtree(replaced)
        else:
            os.rename(replaced, path)


def _is_alive(process: str) -> bool:
    try:
        os.kill(int(process), 0)  # asks; kills nothing
    except (ValueError, ProcessLookupError):
        return False
    except PermissionError:  # it is somebody else's
        return True
    return True


def _empty(folder: Path) -> None:
    for entry in os.scandir(folder):
        if entry.is_dir(follow_symlinks=False):
            shutil.rmtree(entry.path)
        else:
            os.unlink(entry.path)
