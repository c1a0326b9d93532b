"""Locks of files and folders that end with the process that took them.

A lock of the system (`flock`) belongs to an open file, and a forked child has that file
open too: by itself, it would keep the lock after the process that took it was killed.
So children of Python's `os.fork` close it when they begin; programs that are started
never have it. (Record locks, `fcntl`, are no child's either; but one ends as soon as
the process closes its file anywhere, as whoever copies the folder does.) Over NFS the
lock holds among machines.
"""

import contextlib
import fcntl
import os
import re
import threading
import weakref
from pathlib import Path

# Held while a file is opened and locked: no child can begin between the two.
_OPENING = threading.RLock()
# What this process has locked: the file (device and inode) of each descriptor.
_HELD: dict[int, tuple[int, int]] = {}

_OWNER = re.compile(r"process \d+ on \S+")


class AlreadyRunningError(RuntimeError):
    """Another process is writing the same folder."""


class Lock:
    """An open file or folder that is locked, for this process and no other.

    It is let go by `release`, when nobody has this object any more, and at the end of
    the process, however that comes.

    Args:
        path: What to open; not through a link.
        flags: How; see `os.open`.
        remove: Whether the file is removed when it is let go. (Before that: whoever
            has it open already sees that it has lost its name, and makes another.)

    Raises:
        BlockingIOError: when another process has it.
        OSError: when it cannot be opened, or its disk does not lock files.
    """

    def __init__(self, path: Path, flags: int, remove: bool = False):
        with _OPENING:
            descriptor = os.open(path, flags | os.O_NOFOLLOW, 0o666)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                self._file = _identity(os.fstat(descriptor))
            except BaseException:
                os.close(descriptor)
                raise
            _HELD[descriptor] = self._file
        self.descriptor = descriptor
        self._process = os.getpid()
        removed = path if remove else None
        self._release = weakref.finalize(
            self, _close, descriptor, self._process, removed
        )

    @property
    def is_held(self) -> bool:
        """Whether this process has it: not after `release`, nor in a forked child."""
        return self._release.alive and self._process == os.getpid()

    def is_at(self, path: Path) -> bool:
        """Whether what is locked has this name (still)."""
        try:
            return _identity(os.stat(path)) == self._file
        except (FileNotFoundError, NotADirectoryError):
            return False

    def release(self) -> None:
        """Lets it go; nothing the second time."""
        self._release()


class FolderLock:
    """A folder that this process alone writes to.

    There are two locks: a file `.lock` in the folder, and one beside it,
    `.NAME.gshard-lock`, which is there for as long as it is locked. The one beside
    stays when the folder is removed, so that nobody else begins in a new one of that
    name; where the folder above cannot be written to, there is none. Both say whose
    they are. The folder is the one that links lead to.

    Args:
        folder: One that is there.

    Raises:
        AlreadyRunningError: when another process has locked it.
        OSError: when it cannot be locked.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.real = Path(os.path.realpath(folder))
        self._beside = _lock_beside(self.real, folder)
        try:
            self._within = _lock_file(self.real / ".lock", folder)
        except BaseException:
            if self._beside is not None:
                self._beside.release()
            raise

    @property
    def is_own(self) -> bool:
        """Whether it is this process's: not after `release`, nor in a forked child."""
        return self._within.is_held

    @property
    def is_in_place(self) -> bool:
        """Whether the folder of that name is still the one that was locked."""
        return self._within.is_at(self.folder / ".lock")

    def is_of(self, folder: Path) -> bool:
        """Whether this locks a folder, by whatever name."""
        same_path = self.real == Path(os.path.realpath(folder))
        return same_path or self._within.is_at(folder / ".lock")

    def release(self) -> None:
        """Lets others write to the folder."""
        self._within.release()
        if self._beside is not None:
            self._beside.release()


def _identity(found: os.stat_result) -> tuple[int, int]:
    return found.st_dev, found.st_ino


def _lock_beside(real: Path, folder: Path) -> Lock | None:
    if not real.name:  # the root of the disk has nothing beside it
        return None
    try:
        return _lock_file(real.with_name(f".{real.name}.gshard-lock"), folder, True)
    except OSError:
        # The folder above is somebody else's, say. Then the one within must do.
        return None


def _lock_file(path: Path, folder: Path, remove: bool = False) -> Lock:
    lock = None
    while lock is None or not lock.is_at(path):  # or removed since it was opened
        try:
            lock = Lock(path, os.O_RDWR | os.O_CREAT, remove)
        except BlockingIOError as error:
            raise AlreadyRunningError(
                f"Another run{_owner(path)} is writing to {folder}. Give each run a "
                "folder of its own, or stop the other one."
            ) from error
        except OSError as error:
            raise OSError(
                error.errno,
                f"{folder} cannot be locked for this run by {path} "
                f"({error.strerror}). Write to a folder that this user may write to, "
                "on a disk that locks files",
            ) from error
    # For messages only: a disk that is full does not keep a run from going on.
    with contextlib.suppress(OSError):
        text = f"process {os.getpid()} on {os.uname().nodename}\n".encode()
        os.ftruncate(lock.descriptor, 0)
        os.pwrite(lock.descriptor, text, 0)
    return lock


def _owner(path: Path) -> str:
    """Who has locked a file, as a part of a sentence; nothing if it does not say."""
    try:
        with open(path, "rb") as file:
            text = file.read(1000).decode("utf-8", "replace").strip()
    except OSError:  # it may be somebody else's, and is only for the message
        return ""
    return f", {text}," if _OWNER.fullmatch(text) else ""


def _close(descriptor: int, process: int, remove: Path | None) -> None:
    if process != os.getpid():  # a forked child, where objects end too
        return
    with _OPENING:
        file = _HELD.pop(descriptor)
        if remove is not None:
            with contextlib.suppress(OSError):  # the folder above may be gone
                if _identity(os.lstat(remove)) == file:
                    os.unlink(remove)
        os.close(descriptor)


def _begin_in_child() -> None:
    for descriptor, file in _HELD.items():
        # Whoever made a daemon of this process may have closed it already, and opened
        # something else.
        with contextlib.suppress(OSError):
            if _identity(os.fstat(descriptor)) == file:
                os.close(descriptor)
    _HELD.clear()
    _OPENING.release()


os.register_at_fork(
    before=_OPENING.acquire,
    after_in_parent=_OPENING.release,
    after_in_child=_begin_in_child,
)
