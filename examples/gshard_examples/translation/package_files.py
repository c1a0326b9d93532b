"""Reading many small files out of packages without unpacking them."""

from __future__ import annotations

import hashlib
import io
import shutil
import subprocess
import tarfile
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import IO, cast

#: Gives (path inside the package, contents), always in the same order.
Files = Iterable[tuple[str, bytes]]
PathFilter = Callable[[str], bool]

#: What `pip` must install for everything in this package.
EXTRA = "gshard-tf[translation]"


class MissingPackageError(ImportError):
    """A package that the corpus is made from, or read with, is not installed."""


def missing_packages(names: Iterable[str], why: str) -> MissingPackageError:
    """Returns the error that says what to install."""
    listed = ", ".join(names)
    return MissingPackageError(
        f"{why}. Not installed: {listed}. Install them with: pip install '{EXTRA}'"
    )


def check_installed(modules: Mapping[str, str], why: str) -> None:
    """Checks that packages can be imported, without importing them.

    Args:
        modules: The module of each package.
        why: What they are for.

    Raises:
        MissingPackageError: One is not installed.
    """
    missing = [name for name, module in modules.items() if find_spec(module) is None]
    if missing:
        raise missing_packages(missing, why)


def installed_files(
    distribution: str, accept: PathFilter
) -> Iterator[tuple[str, bytes]]:
    """Yields the accepted files that an installed distribution put on this machine.

    The list comes from the distribution's own record, so files outside of
    `site-packages` (gramps keeps its catalogues under `share/locale`) are found
    wherever the installer put them.
    """
    files = metadata.distribution(distribution).files
    if files is None:
        raise missing_packages(
            [distribution],
            f"{distribution} is there, but without the record of its files that pip "
            "writes",
        )
    for file in sorted(files, key=str):
        if accept(file.as_posix()):
            yield file.as_posix(), Path(file.locate()).read_bytes()


def zip_files(archive: Path | bytes, accept: PathFilter) -> Iterator[tuple[str, bytes]]:
    """Yields the accepted files of a zip archive (`.whl`, `.xpi`)."""
    opened = io.BytesIO(archive) if isinstance(archive, bytes) else archive
    with zipfile.ZipFile(opened) as zipped:
        for name in sorted(zipped.namelist()):
            if accept(name):
                yield name, zipped.read(name)


def tar_files(archive: Path, accept: PathFilter) -> Iterator[tuple[str, bytes]]:
    """Yields the accepted files of a tar archive (an npm `.tgz`)."""
    with tarfile.open(archive, "r:*") as tar:
        for member in sorted(tar.getmembers(), key=lambda m: m.name):
            if member.isfile() and accept(member.name):
                yield member.name, _contents(tar, member)


def _contents(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    # `extractfile` gives None for what is no file, which callers have excluded.
    return cast(IO[bytes], tar.extractfile(member)).read()


def folder_files(folder: Path, accept: PathFilter) -> Iterator[tuple[str, bytes]]:
    """Yields the accepted files below a folder."""
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and accept(name):
            yield name, path.read_bytes()


def deb_files(archive: Path, accept: PathFilter) -> Iterator[tuple[str, bytes]]:
    """Yields the accepted files of a Debian package, by Debian's own `dpkg-deb`.

    Raises:
        FileNotFoundError: There is no `dpkg-deb` on this machine.
        OSError: `dpkg-deb` cannot read the package.
    """
    program = shutil.which("dpkg-deb")
    if program is None:
        raise FileNotFoundError(
            f"reading {archive.name} needs the program dpkg-deb (Debian package dpkg), "
            "which is not on the PATH"
        )
    files = []  # a stream can't be sorted: these are a few MB each
    with subprocess.Popen(
        [program, "--fsys-tarfile", str(archive)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        stdout = cast(IO[bytes], process.stdout)
        stderr = cast(IO[bytes], process.stderr)
        try:
            with tarfile.open(fileobj=stdout, mode="r|") as tar:
                for member in tar:
                    if member.isfile() and accept(member.name):
                        files.append((member.name, _contents(tar, member)))
            stdout.read()  # padding; or dpkg-deb dies of a closed pipe
        except tarfile.TarError as error:
            complaint = stderr.read().decode(errors="replace").strip()
            raise OSError(
                f"{archive} is not a whole Debian package: {complaint or error}"
            ) from error
        complaint = stderr.read().decode(errors="replace").strip()
        if process.wait() != 0:
            raise OSError(f"{archive} is not a whole Debian package: {complaint}")
    yield from sorted(files)


def sha256_of(path: Path) -> str:
    """Returns the SHA-256 of a file in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
