"""Writes a checkpoint atomically, from one process or several."""

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

# How long a process waits until another one has written.
WRITE_TIMEOUT_SECONDS = 3600

# The contents of a checkpoint's folder, which may be replaced; damaged ones, too, which
# lack some of them.
CHECKPOINT = Contents("a checkpoint", ("manifest.json", "state.*", "part-*"))


def write(
    path: Path,
    manifest: Manifest,
    shards: Sequence[tensor_bundle.ArrayShard],
    save_id: int,
) -> None:
    """Writes a checkpoint, which gets its name once all of it is on the disk.

    Args:
        path: Its folder.
        manifest: Its manifest, without the files.
        shards: The shards that this process writes; none where others write all of it.
        save_id: A number of this save, the same in all processes.

    Raises:
        FileExistsError: there is another file or folder of that name.
        OSError: the disk is full, for example. No checkpoint is there then.
    """
    if group().count > 1:
        _write_with_others(path, manifest, shards, save_id)
        return
    with new_folder(path, True, CHECKPOINT) as partial:
        tensor_bundle.write(partial / "state", shards)
        _finish(manifest, partial)


def _finish(manifest: Manifest, partial: Path) -> None:
    """Flushes all files to the disk, and writes the manifest last."""
    paths = tensor_bundle.files(partial / "state")
    for path in paths:
        sync(path)
    sizes = {path.name: path.stat().st_size for path in paths}
    # The index has checksums of its blocks, but not of where they are.
    digests = {path.name: sha256(path) for path in paths if path.suffix == ".index"}
    dataclasses.replace(manifest, files=sizes, digests=digests).write(partial)


def _write_with_others(
    path: Path,
    manifest: Manifest,
    shards: Sequence[tensor_bundle.ArrayShard],
    save_id: int,
) -> None:
    """Writes the part of this process; the chief merges all parts and publishes."""
    processes = group()
    key = f"checkpoint/{save_id}"
    partial = path.with_name(f".{path.name}.partial")

    def write_part() -> int:
        if shards:  # TensorFlow writes no empty bundle
            part = partial / f"part-{processes.index:05d}"
            tensor_bundle.write(part, shards)
            for file in tensor_bundle.files(part):
                sync(file)
        return len(shards)

    if not processes.is_chief:
        opened = json.loads(processes.get(f"{key}/open", WRITE_TIMEOUT_SECONDS))
        own_key = f"{key}/part/{processes.index}"
        count = 0
        try:
            if not opened["error"]:
                count = write_part()
        except OSError as error:
            processes.put(own_key, _report(error))
            raise
        processes.put(own_key, _report(None, count))
        _wait_for(f"{key}/done", "the checkpoint could not be written")
        return
    problem: BaseException | None = None
    opened = False
    try:
        with new_folder(path, True, CHECKPOINT) as partial:
            opened = True
            processes.put(f"{key}/open", _report(None))
            counts = [write_part()]
            for i in range(1, processes.count):
                failure = f"process {i} could not write its part"
                report = _wait_for(f"{key}/part/{i}", failure)
                counts.append(report["shards"])
            parts = [partial / f"part-{i:05d}" for i, n in enumerate(counts) if n]
            tensor_bundle.merge(parts, partial / "state")
            idle = [i for i, count in enumerate(counts) if not count]
            _finish(dataclasses.replace(manifest, wrote_nothing=idle or None), partial)
    except BaseException as error:
        problem = error
        raise
    finally:
        if not opened:
            processes.put(f"{key}/open", _report(problem))
        processes.put(f"{key}/done", _report(problem))


def _report(error: BaseException | None, shards: int = 0) -> str:
    """Returns the message of a process: its error, if any, and its number of shards."""
    report = {"error": "", "errno": None, "shards": shards}
    if error is not None:
        report["error"] = str(error) or repr(error)
        report["errno"] = getattr(error, "errno", None)
    return json.dumps(report)


def _wait_for(key: str, failure: str) -> dict[str, Any]:
    """Waits for the message of another process; raises `OSError` for its error."""
    report = json.loads(group().get(key, WRITE_TIMEOUT_SECONDS))
    if report["error"]:
        raise os_error(f"{failure}: {report['error']}", report["errno"])
    return report
