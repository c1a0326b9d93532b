"""Checkpoint manifest: JSON metadata protected by its own checksum."""

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gshard_tf.checkpoints import step_folders
from gshard_tf.checkpoints.errors import CorruptCheckpointError, unreadable
from gshard_tf.io.atomic_files import sha256, write_file

NAME = "manifest.json"
FORMAT = 1


@dataclasses.dataclass(frozen=True)
class Array:
    """One array of a checkpoint.

    Attributes:
        shape: Its shape.
        dtype: TensorFlow's name of its type.
        path: Keras's path of the variable when it was saved, for people to read.
        split: The mesh axis over which each dimension was split; None: not split.
    """

    shape: tuple[int, ...]
    dtype: str
    path: str
    split: tuple[str | None, ...]


@dataclasses.dataclass(frozen=True)
class Manifest:
    """A checkpoint without its arrays.

    Attributes:
        step: The number of steps that the run had done.
        epoch: Keras's epoch of that step.
        epoch_step: The number of steps of that epoch that had been done.
        processes: The number of processes of the run.
        mesh: The axes of its mesh; None without one.
        arrays: By name.
        files: The sizes of the other files, by name.
        digests: SHA-256 of those that have no checksums of their own within.
        logs: The metrics when it was saved.
        data: The position in the input, and its kind; see `ResumableDataset`.
        config: The configuration of the run.
        model: Keras's description of the model, if it has one.
        global_seed: The state of Keras's global seed generator, which belongs to no
            model; None where there was none.
        ended_by: The callbacks that ended the run for good, see `finished_runs`; None
            while it continues.
        wrote_nothing: The processes without a shard of their own, which wrote no file;
            None where each wrote one.
        awaits_end: True where all steps of the epoch are done and its end is to come:
            validation, and what callbacks do then. Else None.
    """

    step: int
    epoch: int
    epoch_step: int
    processes: int
    mesh: dict[str, int] | None
    arrays: dict[str, Array]
    files: dict[str, int]
    digests: dict[str, str]
    logs: dict[str, float]
    data: dict[str, Any]
    config: Any
    model: Any
    global_seed: list[int] | None = None
    ended_by: list[dict[str, Any]] | None = None
    wrote_nothing: list[int] | None = None
    awaits_end: bool | None = None

    @property
    def total_bytes(self) -> int:
        """The size of all files but the manifest."""
        return sum(self.files.values())

    def write(self, folder: Path) -> None:
        """Writes the manifest into the folder of a checkpoint."""
        content = {"format": FORMAT, **dataclasses.asdict(self)}
        for later in ("global_seed", "ended_by", "wrote_nothing", "awaits_end"):
            if content[later] is None:
                del content[later]  # as in manifests of before that entry
        text = _text(content)
        digest = hashlib.sha256(text.encode()).hexdigest()
        whole = _text({"sha256": digest, "content": content}) + "\n"
        write_file(folder / NAME, whole.encode())

    @classmethod
    def read(cls, folder: Path, step: int | None = None) -> "Manifest":
        """Reads and checks the manifest of a checkpoint, and its files' sizes.

        Args:
            folder: The checkpoint.
            step: The step whose checkpoint it must be; None: any.

        Raises:
            CorruptCheckpointError: when it does not match its checksum or cannot be
                read, a file is missing or of another size, or it is that of another
                step.
            FileNotFoundError: when there is no folder of that name.
            OSError: when this process has too many files open, for example.
        """
        if not step_folders.is_named(folder):
            raise FileNotFoundError(f"There is no checkpoint {folder}")
        with _reading(folder, "it"):
            if not folder.is_dir():
                link = folder.is_symlink() and not folder.exists()
                kind = "a link to what is not there" if link else "no folder"
                raise CorruptCheckpointError(f"{folder} is damaged: it is {kind}")
        with _reading(folder, NAME):
            if not (folder / NAME).is_file():
                raise CorruptCheckpointError(f"{folder} is damaged: {NAME} is missing")
            text = (folder / NAME).read_bytes()
        manifest = cls._parsed(folder, text)
        if step is not None and manifest.step != step:
            raise CorruptCheckpointError(
                f"{folder} is damaged: its {NAME} is that of step {manifest.step}"
            )
        for name, size in manifest.files.items():
            with _reading(folder, name):
                path = folder / name
                if not path.is_file():
                    raise CorruptCheckpointError(
                        f"{folder} is damaged: {name} is missing"
                    )
                actual = path.stat().st_size
            if actual != size:
                raise CorruptCheckpointError(
                    f"{folder} is damaged: {name} has {actual} bytes, not {size}"
                )
        for name, digest in manifest.digests.items():
            with _reading(folder, name):
                matches = sha256(folder / name) == digest
            if not matches:
                raise CorruptCheckpointError(
                    f"{folder} is damaged: the checksum of {name}"
                )
        return manifest

    @classmethod
    def _parsed(cls, folder: Path, text: bytes) -> "Manifest":
        try:
            document = json.loads(text.decode("utf-8"))
            content = document["content"]
            digest = hashlib.sha256(_text(content).encode()).hexdigest()
            sound = digest == document["sha256"]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise CorruptCheckpointError(
                f"{folder / NAME} is damaged: {error!r}"
            ) from error
        if not sound:
            raise CorruptCheckpointError(
                f"{folder / NAME} is damaged: its checksum differs"
            )
        if isinstance(content, dict) and content.get("format") != FORMAT:
            raise ValueError(
                f"{folder} was written by another version of gshard_tf: its format "
                f"must be {FORMAT}. Received: format={content.get('format')}"
            )
        try:
            content.pop("format")
            content["arrays"] = {
                name: Array(
                    tuple(array["shape"]),
                    array["dtype"],
                    array["path"],
                    tuple(array["split"]),
                )
                for name, array in content["arrays"].items()
            }
            return cls(**content)
        except (AttributeError, KeyError, TypeError) as error:
            raise CorruptCheckpointError(
                f"{folder / NAME} is damaged: {error!r}"
            ) from error


@contextlib.contextmanager
def _reading(folder: Path, name: str) -> Iterator[None]:
    """Raises the error of a checkpoint whose file of this name cannot be read."""
    try:
        yield
    except OSError as error:
        raise unreadable(str(folder), name, error) from error


def _text(content: Any) -> str:
    # Python reads its own NaN and Infinity back; other readers of JSON may not.
    return json.dumps(content, sort_keys=True, separators=(",", ":"))
