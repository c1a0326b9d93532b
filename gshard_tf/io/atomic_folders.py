"""Atomic writes of folders.

A folder is filled under a hidden name, flushed to the disk, and then renamed, as files
are by `atomic_files`. An existing folder is replaced only by one of the same kind, and
only where no other file is lost. A link stays a link, and leads to the new folder.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fnmatch
import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from gshard_tf.io.atomic_files import not_written, sync
from gshard_tf.io.locks import AlreadyRunningError, Lock
from gshard_tf.io.paths import local_path, refused


@dataclasses.dataclass(frozen=True)
class Contents:
    """The contents of one kind of folder, by which one that may be replaced is known.

    Attributes:
        kind: The name of such a folder in messages, `"a SavedModel"`.
        names: Patterns of all files and folders it may hold, relative to it, with `/`
            between folders: `"variables/*"`. A star does not match a `/`.
        mark: A file that such a folder must hold, however well its names match; None:
            any of the names is enough.
    """

    kind: str
    names: tuple[str, ...]
    mark: str | None = None

    def unexpected_entry(self, folder: Path) -> str | None:
        """Returns the first entry of `folder` that matches no name, or None.

        A link is never expected, for none is ever written.
        """
        for path, kind in _walk(folder):
            matches = kind != "link" and any(
                _matches(path, name) for name in self.names
            )
            within = kind == "folder" and any(
                _matches(path, "/".join(name.split("/")[: path.count("/") + 1]))
                for name in self.names
            )
            if not (matches or within):
                return path
        return None


def check_folder(
    path: str | os.PathLike, replace: bool = False, contents: Contents | None = None
) -> Path:
    """Raises the errors of `new_folder` before any work is done.

    Returns:
        The path of the new folder: without links, `~` expanded.

    Raises:
        ValueError: `path` is remote; see `local_path`.
        FileExistsError: It exists and must not be replaced.
    """
    path = local_path(path)
    real = Path(os.path.realpath(path))
    if not os.path.lexists(real):
        if path.is_symlink():
            raise refused(path, f"is a link to {real}, which is not there")
        above = next(p for p in real.parents if os.path.lexists(p))
        if not above.is_dir():
            raise NotADirectoryError(f"{path} cannot be made: {above} is no folder")
        return real
    if real.is_symlink():  # what `realpath` leaves of links in a circle
        raise refused(path, "is a link that leads back to itself")
    if not real.is_dir():
        raise refused(path, "is no folder")
    for name, folder in _protected_folders():
        if real == folder or real in folder.parents:
            raise refused(path, f"is {name}, or holds it")
    if os.path.ismount(real):
        raise refused(path, "is where a disk is mounted")
    if not replace:
        raise FileExistsError(
            f"{path} exists already, and cannot be made. Remove it, or ask to replace "
            f"it. Received: replace={replace}"
        )
    _check_replaceable(path, real, contents)
    return real


def _check_replaceable(path: Path, real: Path, contents: Contents | None) -> None:
    """Raises `FileExistsError` unless a folder is empty or holds `contents` alone."""
    if not any(os.scandir(real)):
        return
    _check_entries(path, real, contents)
    if contents is None or contents.mark is None:
        return
    if not (real / contents.mark).is_file():
        raise refused(path, f"is not {contents.kind}: it has no {contents.mark}")


def _check_entries(path: Path, real: Path, contents: Contents | None) -> None:
    if contents is None:
        if any(os.scandir(real)):
            raise refused(path, "is not empty")
        return
    entry = contents.unexpected_entry(real)
    if entry is not None:
        raise refused(path, f"holds {entry!r}, no part of {contents.kind}")


def _protected_folders() -> Iterator[tuple[str, Path]]:
    """The folders that are never replaced, and their names in messages."""
    yield "the root of the disk", Path("/")
    with contextlib.suppress(FileNotFoundError):  # the working folder was removed
        yield "the working folder", Path(os.getcwd())
    with contextlib.suppress(RuntimeError):  # a user without a home
        yield "the home folder", Path(os.path.realpath(Path.home()))


@contextlib.contextmanager
def new_folder(
    path: str | os.PathLike, replace: bool = False, contents: Contents | None = None
) -> Iterator[Path]:
    """Makes a hidden folder to fill, which becomes `path` when the block succeeds.

    Leftovers of an earlier, killed run are removed first. When the block raises (Ctrl-C
    too), the hidden folder is removed and `path` is unchanged.

    Args:
        path: The folder to make. Where it is a link to a folder, that one is replaced,
            by the same rules, and the link stays.
        replace: Whether an existing folder is replaced, if it is empty or holds
            `contents` alone. It stays unchanged until the new one is complete, which
            gets its mode. The working folder, `/` and the home folder are never
            replaced.
        contents: The contents of such a folder. None: only an empty one is replaced.

    Yields:
        The folder to write to.

    Raises:
        ValueError: `path` is remote; see `local_path`.
        FileExistsError: `path` exists and `replace` is false, or it is a file, or
            holds other entries. Raised before the block, unless they came meanwhile.
        AlreadyRunningError: Another process is making the same folder.
        OSError: The disk is full, for example.
    """
    path = check_folder(path, replace, contents)
    partial = path.with_name(f".{path.name}.partial")
    replaced = path.with_name(f".{path.name}.replaced")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = _lock(partial, path)
    except FileExistsError:
        raise
    except OSError as error:
        raise not_written(path, error) from error
    try:
        _recover(path, replaced, contents)
        check_folder(path, replace, contents)
        _empty(partial)
        yield partial
        sync(partial)
        # Another program may have written there meanwhile.
        if check_folder(path, replace, contents) != path:
            raise refused(path, "has become a link")
        if path.exists():
            os.chmod(partial, stat.S_IMODE(path.stat().st_mode))
            os.rename(path, replaced)
        os.rename(partial, path)
        sync(path.parent)
        shutil.rmtree(replaced, ignore_errors=True)
    except BaseException as error:
        if lock.is_held:  # else this is a forked child, and its parent continues
            _put_back(path, replaced)
            shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, OSError) and not isinstance(error, FileExistsError):
            raise not_written(path, error) from error
        raise
    finally:
        lock.release()


def _lock(partial: Path, path: Path) -> Lock:
    """Makes the hidden folder and locks it for as long as this process lives."""
    while True:
        with contextlib.suppress(FileExistsError):
            partial.mkdir()
        try:
            # Not through a link: its target would be emptied.
            lock = Lock(partial, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:
            continue  # lost the race: try again
        except NotADirectoryError as error:
            raise refused(partial, f"is no folder, and in the way of {path}") from error
        except BlockingIOError:
            raise AlreadyRunningError(
                f"{path} cannot be written: another process is writing it"
            ) from None
        # It may have been published or removed since it was opened.
        if lock.is_at(partial):
            return lock
        lock.release()


def _put_back(path: Path, replaced: Path) -> None:
    """Gives the old folder its name again after a death between the two renames."""
    if os.path.lexists(replaced) and not os.path.lexists(path):
        os.rename(replaced, path)


def _recover(path: Path, replaced: Path, contents: Contents | None) -> None:
    """Removes the leftovers of a run that died while it replaced the folder."""
    _put_back(path, replaced)
    if not os.path.lexists(replaced):
        return
    if replaced.is_symlink() or not replaced.is_dir():
        raise refused(replaced, f"is no folder, and in the way of {path}")
    # (Some of it may have been removed: its mark, too.)
    _check_entries(replaced, replaced, contents)
    shutil.rmtree(replaced)


def _walk(folder: Path, within: str = "") -> Iterator[tuple[str, str]]:
    """Yields each entry of a folder: its path from there, and its kind.

    The kind is "file", "folder" or "link".
    """
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        path = f"{within}{entry.name}"
        if entry.is_symlink():
            yield path, "link"
        elif entry.is_dir(follow_symlinks=False):
            yield path, "folder"
            yield from _walk(Path(entry.path), f"{path}/")
        else:
            yield path, "file"


def _matches(path: str, pattern: str) -> bool:
    """Returns whether a path matches a pattern, folder by folder."""
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
