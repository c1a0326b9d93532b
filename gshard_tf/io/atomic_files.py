"""Atomic writes of files.

A file is written under a hidden name, flushed to the disk, and then renamed, which the
file system does in one step. A process that dies at any moment, by an error, Ctrl-C,
`kill -9` or a power cut, leaves at most a hidden `.NAME.partial`, which no reader takes
for the file and the next run removes. A link stays a link, and leads to the new file.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import stat
import threading
from pathlib import Path

from gshard_tf.io.paths import local_path


def sync(path: Path) -> None:
    """Waits until a file, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    """Returns the SHA-256 digest of a file, in hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_synced(path: Path, data: bytes) -> None:
    """Writes a file, not through a link, and waits until it is on the disk."""
    with open(path, "wb", opener=_open_no_link) as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _open_no_link(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)


def write_file(path: str | Path, data: bytes) -> None:
    """Writes a file so that `path` is never seen half-written.

    An existing file is replaced, and the new one gets its mode. Where `path` is a link,
    the file that it leads to is replaced.

    Raises:
        ValueError: `path` is remote; see `local_path`.
        FileExistsError: `path` exists and is no file: a folder, a device.
        OSError: The disk is full, for example; `path` is then unchanged.
    """
    path = local_path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    real = Path(os.path.realpath(path))
    mode = _mode_of_file(path, real)
    thread = threading.get_native_id()
    partial = real.with_name(f".{real.name}.{os.getpid()}-{thread}.partial")
    created = False
    try:
        _remove_leftovers(real, partial)
        # Only a file that this call makes is written to and, in the end, removed.
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
        descriptor = os.open(partial, flags, 0o666 if mode is None else mode)
        created = True
        try:
            if mode is not None:
                os.fchmod(descriptor, mode)  # whatever the umask
        finally:
            os.close(descriptor)
        write_synced(partial, data)
        os.replace(partial, real)
        created = False
        sync(real.parent)
    except OSError as error:
        raise not_written(path, error) from error
    finally:
        if created:
            partial.unlink(missing_ok=True)


def _mode_of_file(path: Path, real: Path) -> int | None:
    """Returns the mode of the file that is about to be replaced; None without one."""
    try:
        status = os.lstat(real)
    except FileNotFoundError:
        return None
    if stat.S_ISLNK(status.st_mode):  # what `realpath` leaves of links in a circle
        raise OSError(
            errno.ELOOP,
            f"{path} cannot be written: it is a link that leads back to itself",
        )
    if not stat.S_ISREG(status.st_mode):
        kind = "a folder" if stat.S_ISDIR(status.st_mode) else "no ordinary file"
        raise FileExistsError(
            f"{path} cannot be written: it is {kind}. Name another file."
        )
    # A file that this process wrote must not run with the rights of another user.
    return stat.S_IMODE(status.st_mode) & ~(stat.S_ISUID | stat.S_ISGID)


def _remove_leftovers(path: Path, partial: Path) -> None:
    """Removes the partial files that dead processes left of a file."""
    name = re.compile(rf"\.{re.escape(path.name)}\.(\d+)(-\d+)?\.partial")
    with os.scandir(path.parent) as entries:
        for entry in entries:
            match = name.fullmatch(entry.name)
            if match is None or entry.is_dir(follow_symlinks=False):
                continue
            # A partial file of this thread belongs to an earlier process of the same
            # number, which the first process of a container always has.
            if entry.name == partial.name or not _is_alive(int(match.group(1))):
                Path(entry.path).unlink(missing_ok=True)


def not_written(path: Path, error: OSError) -> OSError:
    """Returns an error of the same class and errno that names the path."""
    reason = error.strerror or str(error)
    text = f"could not write {path} ({reason}); nothing was published"
    return type(error)(text) if error.errno is None else type(error)(error.errno, text)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)  # asks; kills nothing
    except (OverflowError, ProcessLookupError):  # no number of a process, or of none
        return False
    except PermissionError:  # it is another user's
        return True
    return True
