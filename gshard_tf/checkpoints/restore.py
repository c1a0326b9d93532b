"""Restores the newest sound checkpoint of a run, the same one in all processes."""

import dataclasses
import json
import warnings
from collections import Counter
from collections.abc import Callable, Container, Mapping
from pathlib import Path

import tensorflow as tf

from gshard_tf.checkpoints import step_folders, tensor_bundle
from gshard_tf.checkpoints.dataset import ResumableDataset
from gshard_tf.checkpoints.errors import CorruptCheckpointError
from gshard_tf.checkpoints.manifest import Array, Manifest
from gshard_tf.checkpoints.matching import Match
from gshard_tf.checkpoints.snapshot import Reader, repeated, stage
from gshard_tf.checkpoints.training_state import Variable
from gshard_tf.checkpoints.writer import WRITE_TIMEOUT_SECONDS
from gshard_tf.compat.keras_variables import backend_variable
from gshard_tf.runtime.process_group import all_gather_text, group
from gshard_tf.sharding.regions import Region

# Pairs shapes and types of variables with the arrays of a checkpoint.
Matcher = Callable[
    [Mapping[str, tuple[tuple[int, ...], str]], Mapping[str, Array]], Match
]
# The reason for which a checkpoint cannot be read.
Problem = CorruptCheckpointError | FileNotFoundError


@dataclasses.dataclass(frozen=True)
class Restored:
    """The result of a restore.

    Attributes:
        folder: The checkpoint.
        manifest: Its manifest.
        match: The array of each variable; missing variables and extra arrays.
    """

    folder: Path
    manifest: Manifest
    match: Match


def restore(
    directory: Path,
    state: Mapping[str, Variable],
    step: int | None,
    dataset: ResumableDataset | None,
    matcher: Matcher,
    accept: Callable[[Manifest], None] | None,
    corrupt: set[int],
) -> Restored | None:
    """Restores variables and the position in the input; see `CheckpointManager`.

    Args:
        directory: The directory of the run.
        state: The variables.
        step: The step of the checkpoint; None: the newest.
        dataset: The input to move to its position.
        matcher: Pairs variables with arrays; see `matching.match`.
        accept: Called with the manifest; raises where it does not accept it.
        corrupt: Gets the steps of the checkpoints that are passed over.

    Returns:
        The result, or None when there is no checkpoint at all.

    Raises:
        CorruptCheckpointError: when no checkpoint is sound.
        CheckpointMismatchError: when the checkpoint is one of another model.
    """
    damaged: dict[int, CorruptCheckpointError] = {}
    vanished: Counter[int] = Counter()
    while (candidate := _agreed(directory, step, damaged)) is not None:
        path = step_folders.step_path(directory, candidate)
        before = step_folders.identity(path)
        problem: Problem | None = None
        apply: list[Callable[[], None]] = []
        restored = None
        try:
            manifest = Manifest.read(path, candidate)
            if accept is not None:
                accept(manifest)
            restored, apply = _read(path, manifest, state, dataset, matcher)
        except (CorruptCheckpointError, FileNotFoundError) as error:
            problem = error
        now = step_folders.identity(path)
        # (One that was removed when all of it had been read is whole.)
        stays = now == before or (problem is None and now is None)
        problem, stays = _agreed_problem(problem, stays)
        if step is not None and isinstance(problem, FileNotFoundError):
            raise problem
        if not stays and vanished[candidate] < 3:
            # A run that continues meanwhile has removed it, or written it again.
            vanished[candidate] += 1
            continue
        if problem is None:
            for assign in apply:
                assign()
            return restored
        damaged[candidate] = CorruptCheckpointError(str(problem), problem.errno)
        corrupt.add(candidate)
        if step is None:
            warnings.warn(
                f"{problem}. Falling back to the checkpoint before it.",
                stacklevel=3,
            )
    if damaged:
        numbers = [error.errno for error in damaged.values() if error.errno]
        raise CorruptCheckpointError(
            f"No checkpoint in {directory} is sound: "
            + "; ".join(map(str, damaged.values())),
            numbers[0] if numbers else None,
        )
    return None


def _agreed(directory: Path, step: int | None, damaged: Container[int]) -> int | None:
    """The next checkpoint to try: from the list of the first process, the writer."""
    listed = step_folders.steps(directory)[::-1] if step is None else [step]
    candidates = (candidate for candidate in listed if candidate not in damaged)
    return json.loads(all_gather_text("step", json.dumps(next(candidates, None)))[0])


def _read(
    folder: Path,
    manifest: Manifest,
    state: Mapping[str, Variable],
    dataset: ResumableDataset | None,
    matcher: Matcher,
) -> tuple[Restored, list[Callable[[], None]]]:
    """Reads a checkpoint; returns functions that assign the values."""
    targets = {
        name: (tuple(backend_variable(v).shape), backend_variable(v).dtype.name)
        for name, v in state.items()
    }
    match = matcher(targets, manifest.arrays)
    apply = []
    for name, source in match.sources.items():
        read = array_reader(folder, manifest, source)
        if name in match.repeated:
            read = repeated(read)
        apply.append(stage(state[name], read))
    if dataset is not None:
        apply.append(_position(folder, manifest, dataset))
    return Restored(folder, manifest, match), apply


def array_reader(folder: Path, manifest: Manifest, name: str) -> Reader:
    """Returns a function that reads a region of an array of a checkpoint."""
    array = manifest.arrays[name]
    dtype = tf.as_dtype(array.dtype)

    def read(region: Region) -> tf.Tensor:
        return tensor_bundle.read(folder / "state", name, array.shape, region, dtype)

    return read


def _position(
    folder: Path, manifest: Manifest, dataset: ResumableDataset
) -> Callable[[], None]:
    """Reads the position in the input; returns a function that moves to it."""
    batches = manifest.data["batches"]
    if batches is None:
        raise ValueError(
            f"`dataset` cannot be moved to a position: {folder} was saved without "
            f"dataset=. Received: dataset={dataset!r}"
        )
    iterator = None
    if manifest.data["position"] == "iterator" == dataset.position:
        if manifest.processes != group().count:
            raise ValueError(
                f"{folder} was written by {manifest.processes} processes, each with "
                "the state of its own input, which another number of processes cannot "
                "read. Read the position as a count: ResumableDataset(..., "
                f"position='count'). Received: {group().count} processes"
            )
        iterator = tensor_bundle.read(
            folder / "state",
            tensor_bundle.position_name(group().index),
            (),
            (),
            tf.variant,
        )
    dataset.require(iterator)
    return lambda: dataset.restore(batches, iterator)


def _agreed_problem(
    problem: Problem | None, stays: bool
) -> tuple[Problem | None, bool]:
    """The problem of any process with a checkpoint, and whether it stays in place."""
    own = {
        "problem": "" if problem is None else str(problem),
        "absent": isinstance(problem, FileNotFoundError),
        "errno": None if problem is None else problem.errno,
        "stays": stays,
    }
    texts = all_gather_text("restore", json.dumps(own), WRITE_TIMEOUT_SECONDS)
    reports = [json.loads(text) for text in texts]
    stays = all(report["stays"] and not report["absent"] for report in reports)
    for report in reports:
        if report["problem"]:
            kind = FileNotFoundError if report["absent"] else CorruptCheckpointError
            error = kind(report["problem"])
            error.errno = report["errno"]
            return error, stays
    return None, stays
