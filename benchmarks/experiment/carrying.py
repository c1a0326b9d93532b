"""Limits of a machine that is lent for minutes: on its way there, and back."""

import io
import os
import pathlib
import zipfile

from gshard_tf.io.atomic_files import write_file

MIB = 2**20
#: Of what is carried at most, 64 MiB, the rest is this repository.
LIMIT = 56 * MIB
#: Everything of a run that comes back; not its state.
RESULTS = ("*/*/log.jsonl", "*/translated-*/ids.npy", "data-*/about.json")


def check_size(folder: pathlib.Path) -> int:
    """Returns the bytes of all files of a folder.

    Raises:
        ValueError: They are more than can be carried.
    """
    sizes = {p: p.stat().st_size for p in folder.rglob("*") if p.is_file()}
    total = sum(sizes.values())
    if total > LIMIT:
        largest = sorted(sizes, key=lambda p: -sizes[p])[:3]
        names = ", ".join(f"{p.name} {sizes[p] / MIB:.1f} MiB" for p in largest)
        raise ValueError(
            f"The folder must have at most {LIMIT // MIB} MiB: take fewer languages "
            f"(`every`) or a larger vocabulary. Received: {folder} of "
            f"{total / MIB:.1f} MiB ({names})"
        )
    return total


def use_cache(out: pathlib.Path) -> None:
    """Makes jax, which has not started yet, keep compiled programs in a folder."""
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(out / "cache"))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    # Several processes share a GPU.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")


def pack_results(out: pathlib.Path, path: pathlib.Path) -> None:
    """Writes a zip file: logs, losses and translated ids so far."""
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
        for pattern in RESULTS:
            for each in sorted(out.glob(pattern)):
                file.write(each, each.relative_to(out))
    write_file(path, archive.getvalue())
