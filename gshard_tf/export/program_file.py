"""Program files: a zip of `manifest.json`, `programs` and perhaps `constants.npz`.

`programs` has one serialized program of jax after the other, compressed together,
since they are nearly the same. `constants.npz` holds the constants of a step that uses
any. Files are written atomically.
"""

from __future__ import annotations

import io
import os
import zipfile
from collections.abc import Mapping

import numpy as np

from gshard_tf.export.manifest import Manifest
from gshard_tf.export.state_file import npz_bytes, read_npz
from gshard_tf.io.atomic_files import write_file
from gshard_tf.io.paths import local_path


def write_program(
    path: str | os.PathLike,
    manifest: Manifest,
    programs: list[bytes],
    constants: Mapping[str, np.ndarray],
) -> None:
    """Writes a program file; `manifest.variants` index into the joined `programs`."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("manifest.json", manifest.to_json(), zipfile.ZIP_DEFLATED)
        archive.writestr("programs", b"".join(programs), zipfile.ZIP_LZMA)
        if constants:
            archive.writestr("constants.npz", npz_bytes(constants, {}))
    write_file(local_path(path), out.getvalue())


def read_manifest(path: str | os.PathLike) -> Manifest:
    """Returns the manifest of a program file."""
    with _open_program(path) as archive:
        return Manifest.from_json(archive.read("manifest.json").decode())


def read_programs(path: str | os.PathLike) -> tuple[bytes, dict[str, np.ndarray]]:
    """Returns the joined bytes of all programs of a file, and its constants."""
    with _open_program(path) as archive:
        constants: dict[str, np.ndarray] = {}
        if "constants.npz" in archive.namelist():
            constants, _ = read_npz(io.BytesIO(archive.read("constants.npz")))
        return archive.read("programs"), constants


def _open_program(path: str | os.PathLike) -> zipfile.ZipFile:
    try:
        archive = zipfile.ZipFile(local_path(path))
    except zipfile.BadZipFile as error:
        raise ValueError(
            f"The file must be a program file: {error}. Received: {path}"
        ) from error
    if "manifest.json" not in archive.namelist():
        raise ValueError(
            "The file must be a program file. Received: "
            f"{path}, a zip without a manifest.json"
        )
    return archive
