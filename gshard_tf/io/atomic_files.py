"""Whole or not at all: files and folders that appear under their name only complete.

Everything is written beside its destination, flushed to the disk, and then renamed,
which the file system does in one step.  A process that dies at any moment, by an
error, Ctrl-C, ``kill -9`` or a power cut, leaves at most a hidden ``.NAME.partial``
that nobody takes for the real thing and that the next run removes.

What was there is replaced only where nothing of anybody else's is lost: a file by a
file, a folder by a folder of the same kind. A link stays a link, and leads to the new
file or folder.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import errno
import fnmatch
import os
import re
import shutil
import stat
import threading
import urllib.parse
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from gshard_tf.io.locks import AlreadyRunningError, Lock

# (A single letter would be a drive of Windows. `Path` makes one slash of several.)
_ADDRESS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):(/+)(.*)", re.DOTALL)


@dataclasses.dataclass(frozen=True)
class Contents:
    """What a folder of one kind holds, by which it is known to be ours to replace.

    Attributes:
        kind: What such a folder is called in messages, `"a SavedModel"`.
        names: Patterns of all that it may hold, relative to it, with `/` between
            folders: `"variables/*"`. A star does not stand for a `/`.
        mark: A file without which it is none, however well its names fit; None: any
            of the names will do.
    """

    kind: str
    names: tuple[str, ...]
    mark: str | None = None

    def stranger(self, folder: Path) -> str | None:
        """The first thing in `folder` that is no part of this, or None.

        A link is always a stranger, for none is ever written.
        """
        for path, kind in _walk(folder):
            fits = kind != "link" and any(_fits(path, name) for name in self.names)
            within = kind == "folder" and any(
                _fits(path, "/".join(name.split("/")[: path.count("/") + 1]))
                for name in self.names
            )
            if not (fits or within):
                return path
        return None


# ------------------------------------------------------------------------- paths


def local_path(path: str | os.PathLike, name: str = "path") -> Path:
    """A path on this machine's disks: `~` is expanded, `file:///a` is `/a`.

    Args:
        path: What the user gave.
        name: What the user knows it by, for the message.

    Raises:
        ValueError: It is the address of something remote (`gs://`, `s3://`, `hdfs://`,
            `ram://` ...), which would be taken for a local folder called `gs:`.
    """
    text = os.fsdecode(path)
    address = _ADDRESS.fullmatch(text)
    if address is not None:
        scheme, slashes, rest = address.groups()
        host = ""
        if len(slashes) == 2:
            host, _, rest = rest.partition("/")
        if scheme.lower() != "file" or host not in ("", "localhost"):
            raise ValueError(
                f"{name} must be on a disk of this machine, a mounted one too: files "
                "are locked, flushed and renamed there, which remote storage cannot "
                "do. Give a local path, and copy what is written there to "
                f"{scheme}://. Received: {name}={text!r}"
            )
        text = "/" + urllib.parse.unquote(rest)
    try:
        return Path(text).expanduser()
    except RuntimeError as error:  # ~somebody, or no home
        raise ValueError(
            f"{name} begins with a home folder that is not known. "
            f"Received: {name}={text!r}"
        ) from error


def path_option(text: str) -> Path:
    """`local_path` as the `type=` of a command line's option.

    Raises:
        argparse.ArgumentTypeError: what `local_path` raises, for argparse to show.
    """
    try:
        return local_path(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


# ------------------------------------------------------------------------- files


def sync_folder(folder: Path) -> None:
    """Flushes a folder's list of names to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_synced(path: Path, data: bytes) -> None:
    """Writes a file, not through a link, and waits until it is on the disk."""
    with open(path, "wb", opener=_open_no_link) as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _open_no_link(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)


def write_file(path: str | Path, data: bytes) -> None:
    """Writes a file so that ``path`` is never seen half-written.

    A file that is there is replaced and leaves its mode to the new one. Where ``path``
    is a link, the file that it leads to is replaced.

    Raises:
        ValueError: ``path`` is remote; see `local_path`.
        FileExistsError: ``path`` is there and no file: a folder, a device.
        OSError: The disk is full, or the like; ``path`` is then as it was.
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
        # Only what this call makes is written to and, in the end, removed.
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
        sync_folder(real.parent)
    except OSError as error:
        raise _not_written(path, error) from error
    finally:
        if created:
            partial.unlink(missing_ok=True)


def _mode_of_file(path: Path, real: Path) -> int | None:
    """The mode of the file that is about to be replaced; None: there is none."""
    try:
        found = os.lstat(real)
    except FileNotFoundError:
        return None
    if stat.S_ISLNK(found.st_mode):  # what `realpath` leaves of links in a circle
        raise OSError(errno.ELOOP, f"{path} is a link that leads back to itself")
    if not stat.S_ISREG(found.st_mode):
        kind = "a folder" if stat.S_ISDIR(found.st_mode) else "no ordinary file"
        raise FileExistsError(
            f"{path} is {kind}, which a file does not replace. Name another file."
        )
    # Nobody else's rights are given to a file that this process wrote.
    return stat.S_IMODE(found.st_mode) & ~(stat.S_ISUID | stat.S_ISGID)


def _remove_leftovers(path: Path, partial: Path) -> None:
    """Removes the partial files that dead processes left of a file."""
    name = re.compile(rf"\.{re.escape(path.name)}\.(\d+)(-\d+)?\.partial")
    with os.scandir(path.parent) as entries:
        for entry in entries:
            found = name.fullmatch(entry.name)
            if found is None or entry.is_dir(follow_symlinks=False):
                continue
            # One of this very thread is of a process before that had its number, as
            # the first process of a container always has.
            if entry.name == partial.name or not _is_alive(int(found.group(1))):
                Path(entry.path).unlink(missing_ok=True)


# ----------------------------------------------------------------------- folders


def check_folder(
    path: str | os.PathLike, replace: bool = False, ours: Contents | None = None
) -> Path:
    """Raises now what `new_folder` would, so that no work is done in vain.

    Returns:
        Where the folder will be: without links, `~` expanded.

    Raises:
        ValueError: ``path`` is remote; see `local_path`.
        FileExistsError: It exists and must not be replaced.
    """
    path = local_path(path)
    real = Path(os.path.realpath(path))
    if not os.path.lexists(real):
        if path.is_symlink():
            raise _refused(path, f"is a link to {real}, which is not there")
        above = next(p for p in real.parents if os.path.lexists(p))
        if not above.is_dir():
            raise NotADirectoryError(
                f"{above} is no folder, so {path} cannot be made in it"
            )
        return real
    if real.is_symlink():  # what `realpath` leaves of links in a circle
        raise _refused(path, "is a link that leads back to itself")
    if not real.is_dir():
        raise _refused(path, "is no folder")
    for name, place in _kept_places():
        if real == place or real in place.parents:
            raise _refused(path, f"is {name}, or holds it, and is never replaced")
    if os.path.ismount(real):
        raise _refused(path, "is where a disk is mounted and cannot be replaced")
    if not replace:
        raise FileExistsError(f"{path} exists already; remove it, or ask to replace it")
    _check_ours(path, real, ours)
    return real


def _check_ours(path: Path, real: Path, ours: Contents | None) -> None:
    """Raises `FileExistsError` unless a folder is empty or holds `ours` alone."""
    if not any(os.scandir(real)):
        return
    _check_strangers(path, real, ours)
    if ours.mark is not None and not (real / ours.mark).is_file():
        raise _refused(path, f"is not known for {ours.kind}: it has no {ours.mark}")


def _check_strangers(path: Path, real: Path, ours: Contents | None) -> None:
    if ours is None:
        if any(os.scandir(real)):
            raise _refused(path, "is not empty, so it is not replaced")
        return
    stranger = ours.stranger(real)
    if stranger is not None:
        raise _refused(
            path, f"holds {stranger!r}, no part of {ours.kind}, so it is not replaced"
        )


def _refused(path: Path, why: str) -> FileExistsError:
    return FileExistsError(f"{path} {why}. Name another folder, or remove it yourself.")


def _kept_places() -> Iterator[tuple[str, Path]]:
    """The folders that nobody means to replace."""
    yield "the root of the disk", Path("/")
    with contextlib.suppress(FileNotFoundError):  # the working folder was removed
        yield "the working folder", Path(os.getcwd())
    with contextlib.suppress(RuntimeError):  # a user without a home
        yield "the home folder", Path(os.path.realpath(Path.home()))


def make_folder(path: str | os.PathLike, name: str = "folder") -> Path:
    """Makes a folder that may be there already, to write to what is in it.

    Args:
        path: The folder; see `local_path`, which also says what `name` is.

    Returns:
        The folder, with `~` expanded.

    Raises:
        ValueError: It is remote; see `local_path`.
        FileExistsError: It is a file, or a link to what is not there.
        OSError: It cannot be made.
    """
    path = local_path(path, name)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        if path.is_symlink():
            raise _refused(
                path, f"is a link to {os.path.realpath(path)}, which is not there"
            ) from error
        raise _refused(path, "is no folder") from error
    return path


@contextlib.contextmanager
def new_folder(
    path: str | os.PathLike, replace: bool = False, ours: Contents | None = None
) -> Iterator[Path]:
    """Gives a hidden folder to fill, which becomes ``path`` when the block ends well.

    What an earlier, killed run left is removed first.  When the block raises (Ctrl-C
    too), the hidden folder is removed and ``path`` is as it was before.

    Args:
        path: The folder to make. Where it is a link to a folder, that one is replaced,
            by the same rules, and the link stays.
        replace: Whether a folder that is there already is replaced, if it is empty or
            holds ``ours`` alone; it stays as it is until the new one is complete, which
            gets its mode. The working folder, ``/`` and the home folder never are.
        ours: What such a folder holds. None: only an empty one is replaced.

    Yields:
        The folder to write to.

    Raises:
        ValueError: ``path`` is remote; see `local_path`.
        FileExistsError: ``path`` exists and ``replace`` is false, or it is a file, or
            holds something else. Raised before the block, unless it came meanwhile.
        AlreadyRunningError: Another process is making the same folder.
        OSError: The disk is full, or the like.
    """
    path = check_folder(path, replace, ours)
    partial = path.with_name(f".{path.name}.partial")
    replaced = path.with_name(f".{path.name}.replaced")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = _lock(partial, path)
    except FileExistsError:
        raise
    except OSError as error:
        raise _not_written(path, error) from error
    try:
        _recover(path, replaced, ours)
        check_folder(path, replace, ours)
        _empty(partial)
        yield partial
        sync_folder(partial)
        # Somebody may have put something there meanwhile.
        if check_folder(path, replace, ours) != path:
            raise _refused(path, "has become a link")
        if path.exists():
            os.chmod(partial, stat.S_IMODE(path.stat().st_mode))
            os.rename(path, replaced)
        os.rename(partial, path)
        sync_folder(path.parent)
        shutil.rmtree(replaced, ignore_errors=True)
    except BaseException as error:
        if lock.is_held:  # else this is a forked child, and its parent goes on
            _put_back(path, replaced)
            shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, OSError) and not isinstance(error, FileExistsError):
            raise _not_written(path, error) from error
        raise
    finally:
        lock.release()


def _not_written(path: Path, error: OSError) -> OSError:
    """The same kind of error, saying what was not written; it keeps its errno."""
    reason = error.strerror or str(error)
    text = f"could not write {path} ({reason}); nothing was published"
    return type(error)(text) if error.errno is None else type(error)(error.errno, text)


def _lock(partial: Path, path: Path) -> Lock:
    """Makes the hidden folder and locks it for as long as this process lives."""
    while True:
        with contextlib.suppress(FileExistsError):
            partial.mkdir()
        try:
            # Not through a link: what it leads to would be emptied.
            lock = Lock(partial, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:
            continue  # lost the race: try again
        except NotADirectoryError as error:
            raise _refused(
                partial, f"is no folder, and in the way of {path}"
            ) from error
        except BlockingIOError:
            raise AlreadyRunningError(
                f"another process is writing {path} just now"
            ) from None
        # It may have been published or removed since it was opened.
        if lock.is_at(partial):
            return lock
        lock.release()


def _put_back(path: Path, replaced: Path) -> None:
    """Gives the old folder its name again after a death between the two renames."""
    if os.path.lexists(replaced) and not os.path.lexists(path):
        os.rename(replaced, path)


def _recover(path: Path, replaced: Path, ours: Contents | None) -> None:
    """Clears away what a run left that died while it replaced the folder."""
    _put_back(path, replaced)
    if not os.path.lexists(replaced):
        return
    if replaced.is_symlink() or not replaced.is_dir():
        raise _refused(replaced, f"is no folder, and in the way of {path}")
    # (Some of it may have been removed: its mark, too.)
    _check_strangers(replaced, replaced, ours)
    shutil.rmtree(replaced)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)  # asks; kills nothing
    except (OverflowError, ProcessLookupError):  # no number of a process, or of none
        return False
    except PermissionError:  # it is somebody else's
        return True
    return True


def _walk(folder: Path, within: str = "") -> Iterator[tuple[str, str]]:
    """All that a folder holds: its path from there, and "file", "folder" or "link"."""
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        path = f"{within}{entry.name}"
        if entry.is_symlink():
            yield path, "link"
        elif entry.is_dir(follow_symlinks=False):
            yield path, "folder"
            yield from _walk(Path(entry.path), f"{path}/")
        else:
            yield path, "file"


def _fits(path: str, pattern: str) -> bool:
    """Whether a path is of a pattern, folder by folder."""
    parts, patterns = PurePosixPath(path).parts, PurePosixPath(pattern).parts
    return len(parts) == len(patterns) and all(
        map(fnmatch.fnmatchcase, parts, patterns)
    )


def _empty(folder: Path) -> None:
    for entry in os.scandir(folder):
        if entry.is_dir(follow_symlinks=False):
            shutil.rmtree(entry.path)
        else:
            os.unlink(entry.path)
