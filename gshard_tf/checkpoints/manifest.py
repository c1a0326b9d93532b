"""What a checkpoint says of itself: one JSON file, which checks itself."""

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gshard_tf.checkpoints import folders
from gshard_tf.checkpoints.errors import CorruptCheckpointError, unreadable
from gshard_tf.io.atomic_files import sha256, write_file

NAME = "manifest.json"
FORMAT = 1


@dataclasses.dataclass(frozen=True)
class Array:
    """One array of a checkpoint.

    Attributes:
        shape: Its sizes.
        dtype: TensorFlow's name of its type.
        path: Keras's path of the variable when it was saved, for people to read.
        split: The mesh axis that each dimension was split over; None: not split.
    """

    shape: tuple[int, ...]
    dtype: str
    path: str
    split: tuple[str | None, ...]


@dataclasses.dataclass(frozen=True)
class Manifest:
    """A checkpoint without its arrays.

    Attributes:
        step: How many steps the run had done.
        epoch: In which of Keras's epochs that was.
        epoch_step: How many steps of that epoch had been done.
        processes: How many processes the run had.
        mesh: The axes of its mesh; None without one.
        arrays: By name.
        files: The sizes of the other files, by name.
        digests: SHA-256 of those that have no checksums of their own within.
        logs: The metrics when it was saved.
        data: The position in the input, and its kind; see `ResumableDataset`.
        config: The configuration that came with it.
        model: Keras's description of the model, if it has one.
        global_seed: The state of Keras's global seed generator, which is no model's;
            None where there was none.
        ended_by: What ended the run for good, see `endings`; None while it goes on.
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
    def bytes(self) -> int:
        return sum(self.files.values())

    def write(self, folder: Path) -> None:
        content = {"format": FORMAT, **dataclasses.asdict(self)}
        for later in ("global_seed", "ended_by", "wrote_nothing", "awaits_end"):
            if content[later] is None:
                del content[later]  # as it was before there was such an entry
        text = _text(content)
        digest = hashlib.sha256(text.encode()).hexdigest()
        whole = _text({"sha256": digest, "content": content}) + "\n"
        write_file(folder / NAME, whole.encode())

    @classmethod
    def read(cls, folder: Path, step: int | None = None) -> "Manifest":
        """Reads and checks the manifest of a checkpoint, and its files' sizes.

        Args:
            folder: The checkpoint.
            step: Whose checkpoint it must be; None: any.

        Raises:
            CorruptCheckpointError: when it is not what was written or cannot be read,
                a file is missing or of another size, or it is that of another step.
            FileNotFoundError: when there is nothing of that name.
            OSError: when this process has too many files open, or the like.
        """
        if not folders.is_named(folder):
            raise FileNotFoundError(f"There is no checkpoint {folder}")
        with _reading(folder, "it"):
            if not folder.is_dir():
                link = folder.is_symlink() and not folder.exists()
                what = "a link to what is not there" if link else "no folder"
                raise CorruptCheckpointError(f"{folder} is damaged: it is {what}")
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
                found = path.stat().st_size
            if found != size:
                raise CorruptCheckpointError(
                    f"{folder} is damaged: {name} has {found} bytes, not {size}"
                )
        for name, digest in manifest.digests.items():
            with _reading(folder, name):
                found = sha256(folder / name)
            if found != digest:
                raise CorruptCheckpointError(
                    f"{folder} is damaged: the checksum of {name}"
                )
        return manifest

    @classmethod
    def _parsed(cls, folder: Path, text: bytes) -> "Manifest":
        try:
            found = json.loads(text.decode("utf-8"))
            content = found["content"]
            digest = hashlib.sha256(_text(content).encode()).hexdigest()
            sound = digest == found["sha256"]
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
                f"{folder} was written by another version of gshard_tf. Received: "
                f"format {content.get('format')}, wanted {FORMAT}"
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
    """Says which file of a checkpoint it was that could not be read."""
    try:
        yield
    except OSError as error:
        raise unreadable(str(folder), name, error) from error


def _text(content: Any) -> str:
    # Python reads its own NaN and Infinity back; other readers of JSON may not.
    return json.dumps(content, sort_keys=True, separators=(",", ":"))
