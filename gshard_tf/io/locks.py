"""Locks of files and folders that end with the process that took them.

A system lock (`flock`) belongs to an open file, and a forked child has that file open
too: without more, the child would keep the lock after the process that took it was
killed. So children of Python's `os.fork` close the file when they begin; programs that
are started never have it open. (A forked child has no record locks, `fcntl`, either;
but a record lock ends as soon as the process closes the file anywhere, as it does when
it copies the folder.) Over NFS the lock holds among machines.
"""

import contextlib
import fcntl
import os
import re
import threading
import time
import weakref
from pathlib import Path

# Held while a file is opened and locked: no child can begin between the two.
_OPENING = threading.RLock()
# The locks of this process: the file (device and inode) of each descriptor.
_HELD: dict[int, tuple[int, int]] = {}

# How long to wait for a lock of this process whose object is ending: the thread that
# wrote the last checkpoint of an interrupted run may be the last to refer to it, and
# ends it a moment after others have stopped seeing it.
_SECONDS_TO_END = 2.0

_OWNER = re.compile(r"process \d+ on \S+")


class AlreadyRunningError(RuntimeError):
    """Raised when another process is writing the same folder."""


class Lock:
    """An open file or folder that is locked, for this process and no other.

    The lock ends by `release`, with this object, and at the end of the process, also
    when it is killed.

    Args:
        path: The file to open; not through a link.
        flags: See `os.open`.
        remove: Whether the file is removed just before the lock ends. (A process that
            has it open already sees that it has lost its name, and makes another.)

    Raises:
        BlockingIOError: when another process has locked it.
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
        """True while this process has the lock; False in a forked child."""
        return self._release.alive and self._process == os.getpid()

    def is_at(self, path: Path) -> bool:
        """Returns whether the locked file (still) has this name."""
        try:
            return _identity(os.stat(path)) == self._file
        except (FileNotFoundError, NotADirectoryError):
            return False

    def release(self) -> None:
        """Ends the lock; does nothing the second time."""
        self._release()


class FolderLock:
    """The lock of a folder that this process alone writes to.

    There are two locked files: `.lock` in the folder, and `.NAME.gshard-lock` next to
    it, which exists as long as it is locked. The second stays when the folder is
    removed, so that no other process begins in a new one of that name; where the parent
    folder cannot be written to, there is none. Both hold the process and the host of
    their owner. Links are followed to the real folder.

    Args:
        folder: An existing folder.

    Raises:
        AlreadyRunningError: when another process has locked it, or when this one has
            and does not end it within two seconds.
        OSError: when it cannot be locked.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.real = Path(os.path.realpath(folder))
        self._outer = _lock_outer(self.real, folder)
        try:
            self._inner = _lock_file(self.real / ".lock", folder)
        except BaseException:
            if self._outer is not None:
                self._outer.release()
            raise

    @property
    def is_own(self) -> bool:
        """True while this process has the lock; False in a forked child."""
        return self._inner.is_held

    @property
    def is_in_place(self) -> bool:
        """True while the folder of that name is the one that was locked."""
        return self._inner.is_at(self.folder / ".lock")

    def is_of(self, folder: Path) -> bool:
        """Returns whether this locks a folder, under any of its names."""
        same_path = self.real == Path(os.path.realpath(folder))
        return same_path or self._inner.is_at(folder / ".lock")

    def release(self) -> None:
        """Ends the lock, so that other processes may write to the folder."""
        self._inner.release()
        if self._outer is not None:
            self._outer.release()


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


def _lock_outer(real: Path, folder: Path) -> Lock | None:
    if not real.name:  # the root of the disk has no parent
        return None
    try:
        return _lock_file(real.with_name(f".{real.name}.gshard-lock"), folder, True)
    except OSError:
        # The parent folder is another user's, for example: `.lock` must do.
        return None


def _lock_file(path: Path, folder: Path, remove: bool = False) -> Lock:
    lock = None
    deadline = time.monotonic() + _SECONDS_TO_END
    while lock is None or not lock.is_at(path):  # or removed since it was opened
        was_ours = _is_ours(path)  # before, since it may end at any time
        try:
            lock = Lock(path, os.O_RDWR | os.O_CREAT, remove)
        except BlockingIOError as error:
            if was_ours and time.monotonic() < deadline:
                time.sleep(0.01)
                continue
            raise AlreadyRunningError(
                f"{folder} cannot be locked: another run{_owner(path)} is writing to "
                "it. Give each run a folder of its own, or stop the other one."
            ) from error
        except OSError as error:
            raise OSError(
                error.errno,
                f"{folder} cannot be locked for this run by {path} "
                f"({error.strerror}). Write to a folder that this user may write to, "
                "on a disk that locks files",
            ) from error
    # For messages only: a full disk must not stop the run here.
    with contextlib.suppress(OSError):
        text = f"process {os.getpid()} on {os.uname().nodename}\n".encode()
        os.ftruncate(lock.descriptor, 0)
        os.pwrite(lock.descriptor, text, 0)
    return lock


def _is_ours(path: Path) -> bool:
    """Returns whether this process has a file locked."""
    with _OPENING:
        try:
            return _identity(os.stat(path)) in _HELD.values()
        except OSError:
            return False


def _owner(path: Path) -> str:
    """Returns the owner that a locked file names, as a part of a sentence, or ""."""
    try:
        with open(path, "rb") as file:
            text = file.read(1000).decode("utf-8", "replace").strip()
    except OSError:  # it may be another user's, and is only for the message
        return ""
    return f", {text}," if _OWNER.fullmatch(text) else ""


def _close(descriptor: int, process: int, remove: Path | None) -> None:
    if process != os.getpid():  # a forked child, where objects end too
        return
    with _OPENING:
        file = _HELD.pop(descriptor)
        if remove is not None:
            with contextlib.suppress(OSError):  # the parent folder may be gone
                if _identity(os.lstat(remove)) == file:
                    os.unlink(remove)
        os.close(descriptor)


def _begin_in_child() -> None:
    for descriptor, file in _HELD.items():
        # A library that makes a daemon of this process may have closed the descriptor
        # already, and opened another file under its number.
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
