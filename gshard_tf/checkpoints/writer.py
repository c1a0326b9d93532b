"""A checkpoint onto the disk, whole or not at all, by one process or by many."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gshard_tf.checkpoints import tensor_bundle
from gshard_tf.checkpoints.errors import os_error
from gshard_tf.checkpoints.manifest import Manifest
from gshard_tf.io.atomic_files import sha256, sync
from gshard_tf.io.atomic_folders import Contents, new_folder
from gshard_tf.runtime.process_group import group

# How long one process waits for what another one writes.
WRITE_TIMEOUT_SECONDS = 3600

# What is in the folder of a checkpoint, and so may be replaced; damaged ones too, which
# lack some of it.
CHECKPOINT = Contents("a checkpoint", ("manifest.json", "state.*", "part-*"))


def write(
    path: Path, manifest: Manifest, pieces: Sequence[tensor_bundle.Piece], turn: int
) -> None:
    """Writes a checkpoint; it has its name once all of it is on the disk.

    Args:
        path: Its folder.
        manifest: What it says of itself, but for its files.
        pieces: Those of this process; none where others have all that it has.
        turn: Which checkpoint of this run it is, the same in all processes.

    Raises:
        FileExistsError: there is something else of that name.
        OSError: the disk is full, or the like. Nothing is there then.
    """
    if group().count > 1:
        _write_together(path, manifest, pieces, turn)
        return
    with new_folder(path, True, CHECKPOINT) as partial:
        tensor_bundle.write(partial / "state", pieces)
        _finish(manifest, partial)


def _finish(manifest: Manifest, partial: Path) -> None:
    """Puts everything on the disk, and the manifest last."""
    paths = tensor_bundle.files(partial / "state")
    for path in paths:
        sync(path)
    sizes = {path.name: path.stat().st_size for path in paths}
    # The index has checksums of its blocks, but not of where they are.
    digests = {path.name: sha256(path) for path in paths if path.suffix == ".index"}
    dataclasses.replace(manifest, files=sizes, digests=digests).write(partial)


def _write_together(
    path: Path, manifest: Manifest, pieces: Sequence[tensor_bundle.Piece], turn: int
) -> None:
    """Each process that has pieces writes its part; the chief merges and publishes."""
    processes = group()
    key = f"checkpoint/{turn}"
    partial = path.with_name(f".{path.name}.partial")

    def write_part() -> int:
        if pieces:  # TensorFlow writes no bundle of nothing
            part = partial / f"part-{processes.index:05d}"
            tensor_bundle.write(part, pieces)
            for path in tensor_bundle.files(part):
                sync(path)
        return len(pieces)

    if not processes.is_chief:
        opened = json.loads(processes.get(f"{key}/open", WRITE_TIMEOUT_SECONDS))
        mine = f"{key}/part/{processes.index}"
        count = 0
        try:
            if not opened["error"]:
                count = write_part()
        except OSError as error:
            processes.put(mine, _told(error))
            raise
        processes.put(mine, _told(None, count))
        _heard(f"{key}/done", "the checkpoint could not be written")
        return
    problem: BaseException | None = None
    opened = False
    try:
        with new_folder(path, True, CHECKPOINT) as partial:
            opened = True
            processes.put(f"{key}/open", _told(None))
            counts = [write_part()]
            for i in range(1, processes.count):
                what = f"process {i} could not write its part"
                counts.append(_heard(f"{key}/part/{i}", what)["pieces"])
            parts = [partial / f"part-{i:05d}" for i, n in enumerate(counts) if n]
            tensor_bundle.merge(parts, partial / "state")
            idle = [i for i, count in enumerate(counts) if not count]
            _finish(dataclasses.replace(manifest, wrote_nothing=idle or None), partial)
    except BaseException as error:
        problem = error
        raise
    finally:
        if not opened:
            processes.put(f"{key}/open", _told(problem))
        processes.put(f"{key}/done", _told(problem))


def _told(error: BaseException | None, pieces: int = 0) -> str:
    """What a process tells the others: an error or none, and how much it wrote."""
    said = {"error": "", "errno": None, "pieces": pieces}
    if error is not None:
        said["error"] = str(error) or repr(error)
        said["errno"] = getattr(error, "errno", None)
    return json.dumps(said)


def _heard(key: str, what: str) -> dict[str, Any]:
    """Waits for what another process tells; raises `OSError` if it is an error."""
    said = json.loads(group().get(key, WRITE_TIMEOUT_SECONDS))
    if said["error"]:
        raise os_error(f"{what}: {said['error']}", said["errno"])
    return said
