"""What a checkpoint says of itself: one JSON file, which checks itself."""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

from gshard_files import write_file
from gshard_tf.checkpoints.errors import DamagedError

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
        data: The position in the input, and its kind; see `ResumableData`.
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
    def read(cls, folder: Path) -> "Manifest":
        """Reads and checks the manifest of a checkpoint, and its files' sizes.

        Raises:
            DamagedError: when it is not what was written, or a file is missing or of
                another size.
            FileNotFoundError: when the folder is no checkpoint.
        """
        if not folder.is_dir():
            raise FileNotFoundError(f"There is no checkpoint {folder}")
        if not (folder / NAME).is_file():
            raise DamagedError(f"{folder} is damaged: {NAME} is missing")
        try:
            text = (folder / NAME).read_text("utf-8")
            found = json.loads(text)
            content = found["content"]
            digest = hashlib.sha256(_text(content).encode()).hexdigest()
            sound = digest == found["sha256"]
        except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as error:
            raise DamagedError(f"{folder / NAME} is damaged: {error!r}") from error
        if not sound:
            raise DamagedError(f"{folder / NAME} is damaged: its checksum differs")
        if content.pop("format") != FORMAT:
            raise ValueError(
                f"{folder} was written by another version of gshard_tf. Received: "
                f"format {found['content'].get('format')}, wanted {FORMAT}"
            )
        content["arrays"] = {
            name: Array(
                tuple(array["shape"]),
                array["dtype"],
                array["path"],
                tuple(array["split"]),
            )
            for name, array in content["arrays"].items()
        }
        manifest = cls(**content)
        for name, size in manifest.files.items():
            path = folder / name
            if not path.is_file():
                raise DamagedError(f"{folder} is damaged: {name} is missing")
            if path.stat().st_size != size:
                raise DamagedError(
                    f"{folder} is damaged: {name} has {path.stat().st_size} bytes, "
                    f"not {size}"
                )
        for name, digest in manifest.digests.items():
            if sha256(folder / name) != digest:
                raise DamagedError(f"{folder} is damaged: the checksum of {name}")
        return manifest


def sha256(path: Path) -> str:
    """The digest of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _text(content: Any) -> str:
    # Python reads its own NaN and Infinity back; other readers of JSON may not.
    return json.dumps(content, sort_keys=True, separators=(",", ":"))
