"""The files that a program travels in, written so that nobody sees half of one.

A program file is a zip of `manifest.json`, `programs` (one serialised program of jax
after the other; compressed together, since they are nearly the same) and, where the
step uses constants, `constants.npz`. A state file is an `.npz` of arrays by name. Data
are a folder of `.npy` arrays, one per input.
"""

from __future__ import annotations

import io
import json
import os
import zipfile
from collections.abc import Mapping
from typing import Any

import numpy as np

from gshard_tf.export.manifest import Manifest
from gshard_tf.io.atomic_files import write_file
from gshard_tf.io.paths import local_path

Path = str | os.PathLike

_META = "__meta__"


# ------------------------------------------------------------------------ programs


def write_program(
    path: Path,
    manifest: Manifest,
    programs: list[bytes],
    constants: Mapping[str, np.ndarray],
) -> None:
    """Writes a program file; `manifest.variants` say where in `programs` each is."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("manifest.json", manifest.to_json(), zipfile.ZIP_DEFLATED)
        archive.writestr("programs", b"".join(programs), zipfile.ZIP_LZMA)
        if constants:
            archive.writestr("constants.npz", _npz(constants, {}))
    write_file(path, out.getvalue())


def read_manifest(path: Path) -> Manifest:
    """The manifest of a program file."""
    with _open_program(path) as archive:
        return Manifest.from_json(archive.read("manifest.json").decode())


def read_programs(path: Path) -> tuple[bytes, dict[str, np.ndarray]]:
    """The bytes of all programs of a file, and its constants."""
    with _open_program(path) as archive:
        constants = {}
        if "constants.npz" in archive.namelist():
            constants, _ = _arrays(io.BytesIO(archive.read("constants.npz")))
        return archive.read("programs"), constants


def _open_program(path: Path) -> zipfile.ZipFile:
    try:
        archive = zipfile.ZipFile(local_path(path))
    except zipfile.BadZipFile as error:
        raise ValueError(f"{path} is no program file: {error}") from error
    if "manifest.json" not in archive.namelist():
        raise ValueError(f"{path} is no program file: it has no manifest.json")
    return archive


# --------------------------------------------------------------------------- state


def write_state(path: Path, arrays: Mapping[str, np.ndarray], **meta: Any) -> None:
    """Writes a state file.

    Args:
        path: Where; the file that is there is replaced when the new one is whole.
        arrays: By name.
        meta: What else to keep, as JSON can: the number of steps done, say.
    """
    write_file(path, _npz(arrays, meta))


def read_state(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The arrays of a state file, and what `write_state` was given besides."""
    return _arrays(local_path(path))


def _npz(arrays: Mapping[str, np.ndarray], meta: Mapping[str, Any]) -> bytes:
    # numpy's file format does not know bfloat16 and its kin, so types are noted.
    dtypes = {name: array.dtype.name for name, array in arrays.items()}
    note = json.dumps({"dtypes": dtypes, **meta})
    out = io.BytesIO()
    np.savez(out, **{_META: np.array(note)}, **arrays)
    return out.getvalue()


def _arrays(file: Any) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    import ml_dtypes  # noqa: F401 (so that numpy knows its types by name)

    with np.load(file) as saved:
        if _META not in saved.files:
            raise ValueError(f"{file} is no state file of gshard_tf.")
        meta = json.loads(str(saved[_META]))
        dtypes = meta.pop("dtypes")
        arrays = {
            name: saved[name].view(np.dtype(dtypes[name]))
            for name in saved.files
            if name != _META
        }
    return arrays, meta


# ---------------------------------------------------------------------------- data


def write_data(folder: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes packed data: for each input of a program all of its rows.

    Args:
        folder: Where, on a local or mounted disk; it is made.
        arrays: `[N, ...]` by the name of the input (`gshard_tf.export.named_batch`
            names the parts of a batch). Integers may be of a smaller type than the
            program's: token ids fit `uint16`.
    """
    folder = local_path(folder, "folder")
    lengths = {name: len(array) for name, array in arrays.items()}
    if not arrays or len(set(lengths.values())) > 1:
        raise ValueError(
            f"Data have one row per example in every array. Received: rows={lengths}"
        )
    for name, array in arrays.items():
        out = io.BytesIO()
        np.save(out, np.asarray(array))
        write_file(folder / f"{name}.npy", out.getvalue())
