"""State files: an `.npz` of arrays by name, with their dtypes and metadata."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from gshard_tf.io.atomic_files import write_file
from gshard_tf.io.paths import local_path

_META = "__meta__"


def write_state(
    path: str | os.PathLike, arrays: Mapping[str, np.ndarray], **meta: Any
) -> None:
    """Writes a state file.

    Args:
        path: The file. An existing one is replaced atomically.
        arrays: Arrays by name.
        meta: Other entries that JSON can hold, such as the number of steps done.
    """
    write_file(local_path(path), npz_bytes(arrays, meta))


def read_state(path: str | os.PathLike) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Returns the arrays of a state file, and its other entries."""
    return read_npz(local_path(path))


def npz_bytes(arrays: Mapping[str, np.ndarray], meta: Mapping[str, Any]) -> bytes:
    """Returns arrays and metadata as the bytes of an `.npz` file."""
    # numpy's file format lacks bfloat16 and similar types, so dtypes are stored.
    dtypes = {name: array.dtype.name for name, array in arrays.items()}
    note = json.dumps({"dtypes": dtypes, **meta})
    out = io.BytesIO()
    entries: dict[str, Any] = {_META: np.array(note), **arrays}
    np.savez(out, **entries)
    return out.getvalue()


def read_npz(file: Any) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Returns arrays and metadata of an `.npz` file that `npz_bytes` made."""
    import ml_dtypes  # noqa: F401 (so that numpy knows its types by name)

    with np.load(file) as saved:
        if _META not in saved.files:
            raise ValueError(
                f"The file must be a state file of gshard_tf. Received: {file}"
            )
        meta = json.loads(str(saved[_META]))
        dtypes = meta.pop("dtypes")
        arrays = {
            name: saved[name].view(np.dtype(dtypes[name]))
            for name in saved.files
            if name != _META
        }
    return arrays, meta
