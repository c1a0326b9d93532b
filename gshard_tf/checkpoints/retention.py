"""Retention: which checkpoints of a run are kept, and which one is the best."""

import warnings
from collections.abc import Container, Mapping
from pathlib import Path

from gshard_tf.checkpoints import step_folders
from gshard_tf.checkpoints.errors import CorruptCheckpointError
from gshard_tf.checkpoints.manifest import Manifest


def read_manifests(directory: Path) -> dict[int, Manifest | CorruptCheckpointError]:
    """Returns the manifest of each step, or the error of one that cannot be read."""

    def read(step: int) -> Manifest | CorruptCheckpointError:
        try:
            return Manifest.read(step_folders.step_path(directory, step), step)
        except CorruptCheckpointError as error:
            return error
        except FileNotFoundError as error:
            return CorruptCheckpointError(str(error))

    return step_folders.read_listed(lambda: step_folders.steps(directory), read)


def best_step(
    manifests: Mapping[int, Manifest | CorruptCheckpointError],
    monitor: str | None,
    mode: str,
) -> int | None:
    """Returns the step with the best value of a metric; None when none has it."""
    scores = {}
    for step, manifest in manifests.items():
        if monitor is None or isinstance(manifest, CorruptCheckpointError):
            continue
        score = manifest.logs.get(monitor)
        if score is not None and score == score:  # not NaN
            scores[step] = score
    if not scores:
        return None
    # Of equals the older.
    return (min if mode == "min" else max)(scores, key=lambda step: scores[step])


def prune(
    directory: Path,
    max_to_keep: int | None,
    monitor: str | None,
    mode: str,
    corrupt: Container[int],
) -> None:
    """Removes the checkpoints that need not be kept.

    Args:
        directory: The directory of the run.
        max_to_keep, monitor, mode: See `CheckpointManager`.
        corrupt: Steps that neither count among those to keep, nor are removed.
    """
    sound = [s for s in step_folders.steps(directory) if s not in corrupt]
    kept: set[int | None] = {*(sound if max_to_keep is None else sound[-max_to_keep:])}
    if monitor is not None:
        manifests = read_manifests(directory)
        kept.add(best_step(manifests, monitor, mode))
        # Where the disk did not answer, it may have been the best.
        kept |= {
            step
            for step, manifest in manifests.items()
            if isinstance(manifest, CorruptCheckpointError) and manifest.errno
        }
    for step in sound:
        if step in kept:
            continue
        try:
            step_folders.remove(directory, step)
        except OSError as error:
            # No reason to end a run: its new checkpoint is whole.
            warnings.warn(
                f"{step_folders.step_path(directory, step)} is no longer needed, and "
                f"could not be removed ({error.strerror}). Remove it by hand.",
                stacklevel=2,
            )
