"""Paths on this machine's disks, and folders to write to."""

from __future__ import annotations

import argparse
import os
import re
import urllib.parse
from pathlib import Path

# (A single letter would be a drive of Windows. `Path` makes one slash of several.)
_ADDRESS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):(/+)(.*)", re.DOTALL)


def local_path(path: str | os.PathLike, name: str = "path") -> Path:
    """Returns a path on this machine's disks: `~` is expanded, `file:///a` is `/a`.

    Args:
        path: The user's path.
        name: The user's name for it, for the message.

    Raises:
        ValueError: It is a remote address (`gs://`, `s3://`, `hdfs://`, `ram://` ...),
            which would be taken for a local folder called `gs:`.
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
    except RuntimeError as error:  # ~unknown-user, or no home
        raise ValueError(
            f"{name} must begin with a known home folder. Received: {name}={text!r}"
        ) from error


def path_option(text: str) -> Path:
    """Returns `local_path` of an option; the `type=` of command lines.

    Raises:
        argparse.ArgumentTypeError: the error of `local_path`, for argparse to show.
    """
    try:
        return local_path(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def make_folder(path: str | os.PathLike, name: str = "folder") -> Path:
    """Makes a folder, unless it exists.

    Args:
        path: The folder.
        name: See `local_path`.

    Returns:
        The folder, with `~` expanded.

    Raises:
        ValueError: It is remote; see `local_path`.
        FileExistsError: It is a file, or a link to a path that does not exist.
        OSError: It cannot be made.
    """
    path = local_path(path, name)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        if path.is_symlink():
            target = os.path.realpath(path)
            raise refused(path, f"is a link to {target}, which is not there") from error
        raise refused(path, "is no folder") from error
    return path


def refused(path: Path, reason: str) -> FileExistsError:
    """Returns the error for a folder that must not be written to or replaced."""
    return FileExistsError(
        f"{path} cannot be used: it {reason}. Name another folder, or remove it."
    )
