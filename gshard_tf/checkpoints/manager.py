"""The checkpoints of a run: written in the background, kept by rules, restored."""

import dataclasses
import json
import os
import shutil
import threading
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Container, Mapping, Sequence
from pathlib import Path
from typing import Any

import tensorflow as tf

from gshard_tf.checkpoints import folders, tensor_bundle
from gshard_tf.checkpoints.dataset import ResumableDataset
from gshard_tf.checkpoints.errors import CorruptCheckpointError
from gshard_tf.checkpoints.manifest import Manifest
from gshard_tf.checkpoints.matching import Match, match
from gshard_tf.checkpoints.naming import Variable, array_of
from gshard_tf.checkpoints.snapshot import (
    describe,
    load,
    repeated,
    snapshot,
)
from gshard_tf.checkpoints.writer import WRITE_TIMEOUT_SECONDS, write
from gshard_tf.compat.keras_seeds import global_seed_state
from gshard_tf.io.locks import FolderLock
from gshard_tf.io.paths import local_path, make_folder
from gshard_tf.runtime.process_group import (
    all_gather_text,
    group,
    next_collective_id,
)


@dataclasses.dataclass(frozen=True)
class Restored:
    """What a restore did.

    Attributes:
        folder: The checkpoint.
        manifest: What it says of itself.
        match: Which array went where; what was missing and what was left over.
    """

    folder: Path
    manifest: Manifest
    match: Match


# The objects of this process that may write, each to its own folder.
_HOLDERS: "weakref.WeakSet[CheckpointManager]" = weakref.WeakSet()


class CheckpointManager:
    """The checkpoints of one run, in one folder.

    Each is a folder `step-NNNNNNNNNN` that appears under its name only when it is
    complete and on the disk. A process that dies at any moment leaves at most a hidden
    folder, which the next one removes.

    Args:
        directory: Where they are, on a local or mounted disk; `~` is expanded. With
            several processes: on a disk that all of them see.
        max_to_keep: How many of the newest are kept; None: all.
        monitor: A metric of `logs` by which the best one is kept as well.
        mode: `"min"` or `"max"`: which value of `monitor` is better.
        asynchronous: Whether `save` returns once the values are copied, and a thread
            writes them at the lowest priority while training goes on. What goes wrong
            there is raised by the next `save` or `wait`.

    Raises:
        ValueError: when an argument is none of these, or the folder is remote, `gs://`
            say.
    """

    def __init__(
        self,
        directory: str | Path,
        max_to_keep: int | None = 3,
        monitor: str | None = None,
        mode: str = "min",
        asynchronous: bool = True,
    ):
        if max_to_keep is not None and (
            isinstance(max_to_keep, bool) or max_to_keep < 1
        ):
            raise ValueError(
                "`max_to_keep` must be at least 1, or None. Received: "
                f"max_to_keep={max_to_keep!r}"
            )
        if mode not in ("min", "max"):
            raise ValueError(f"`mode` must be 'min' or 'max'. Received: mode={mode!r}")
        self.directory = local_path(directory, "directory").absolute()
        self.max_to_keep = max_to_keep
        self.monitor = monitor
        self.mode = mode
        self.asynchronous = asynchronous
        # Held until `close`, or until nobody has this object any more.
        self._lock: FolderLock | None = None
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._damaged: set[int] = set()

    # -- what there is -----------------------------------------------------------

    def steps(self) -> list[int]:
        """The steps that have a complete checkpoint, oldest first."""
        return folders.steps(self.directory)

    def path(self, step: int) -> Path:
        """The folder of a step's checkpoint."""
        return folders.path_of(self.directory, step)

    def manifest(self, step: int) -> Manifest:
        """What a checkpoint says of itself.

        Raises:
            CorruptCheckpointError: when it is damaged, or cannot be read.
            FileNotFoundError: when there is none of that step.
        """
        return Manifest.read(self.path(step), step)

    def best(self) -> int | None:
        """The step of the best checkpoint, by the metric; None when none has it."""
        return self._best_of(self._manifests())

    def _best_of(
        self, manifests: Mapping[int, Manifest | CorruptCheckpointError]
    ) -> int | None:
        scores = {}
        for step, manifest in manifests.items():
            if isinstance(manifest, CorruptCheckpointError):
                continue
            score = manifest.logs.get(self.monitor)
            if score is not None and score == score:  # not NaN
                scores[step] = score
        if not scores:
            return None
        # Of equals the older.
        return (min if self.mode == "min" else max)(scores, key=scores.get)

    def _manifests(self) -> dict[int, Manifest | CorruptCheckpointError]:
        """What each checkpoint says of itself, or what is wrong with it."""

        def read(step: int) -> Manifest | CorruptCheckpointError:
            try:
                return self.manifest(step)
            except CorruptCheckpointError as error:
                return error
            except FileNotFoundError as error:
                return CorruptCheckpointError(str(error))

        return folders.read_listed(self.steps, read)

    # -- saving ---------------------------------------------------------------------

    def claim(self) -> None:
        """Makes the folder this process's own until it ends, or `close`.

        It is the folder that links lead to, and is this process's by every name. A
        forked child of this process does not have it. Where the folder was removed or
        replaced since it was claimed, which is a warning, it is made again.

        Raises:
            AlreadyRunningError: when another run writes there.
            FileExistsError: when it is a file, or a link to what is not there, or
                something that is none of ours has the name of a step's hidden folder.
            OSError: when it cannot be written to, or its disk does not lock files.
        """
        if not group().is_chief:
            return
        if self._lock is not None and self._lock.is_own:
            if self._lock.is_in_place:
                return
            self._lock.release()
            warnings.warn(
                f"{self.directory} was removed or replaced while this run was writing "
                "to it. What was in it is gone. The run goes on, and makes it again.",
                stacklevel=2,
            )
        make_folder(self.directory)
        for other in list(_HOLDERS):
            if other is not self and other._holds(self.directory):
                # Of a `fit` of this process that was interrupted.
                other.close()
        lock = FolderLock(self.directory)
        try:
            # What a run that was killed left half-written. (The lock says: it is gone.)
            for leftover in folders.leftovers(self.directory):
                shutil.rmtree(leftover, ignore_errors=True)
        except BaseException:
            lock.release()
            raise
        self._lock = lock
        _HOLDERS.add(self)

    def _holds(self, folder: Path) -> bool:
        lock = self._lock
        return lock is not None and lock.is_own and lock.is_of(folder)

    def close(self) -> None:
        """Waits for the checkpoint under way, and lets others write to the folder."""
        try:
            self.wait()
        finally:
            if self._lock is not None:
                self._lock.release()
                self._lock = None

    def save(
        self,
        state: Mapping[str, Variable],
        step: int,
        epoch: int = 0,
        epoch_step: int = 0,
        logs: Mapping[str, float] | None = None,
        dataset: ResumableDataset | None = None,
        config: Any = None,
        model: Any = None,
        awaits_end: bool = False,
    ) -> None:
        """Writes a checkpoint; `Manifest` describes the arguments but `state`.

        For `state` see `training_state`.

        With several processes, each of them calls this at the same step.

        Raises:
            OSError: when this one or the one before could not be written. Earlier
                checkpoints are as they were.
        """
        self.wait()
        self.claim()
        processes = group()
        position = None if dataset is None else dataset.state()
        pieces = snapshot(state, processes.is_chief)
        if position is not None and position["iterator"] is not None:
            saved = position.pop("iterator")
            name = tensor_bundle.position_name(processes.index)
            pieces.append(tensor_bundle.Piece(name, (), (), saved))
        manifest = Manifest(
            step=step,
            epoch=epoch,
            epoch_step=epoch_step,
            processes=processes.count,
            mesh=_mesh_of(state),
            arrays=describe(state),
            files={},
            digests={},
            logs={name: float(value) for name, value in (logs or {}).items()},
            data={
                "batches": None if position is None else position["batches"],
                "position": None if dataset is None else dataset.position,
            },
            config=config,
            model=model,
            global_seed=_global_seed(),
            awaits_end=awaits_end or None,
        )
        turn = next_collective_id()
        if self.asynchronous:
            self._thread = threading.Thread(
                target=self._write_in_background, args=(manifest, pieces, turn)
            )
            self._thread.start()
        else:
            self._write(manifest, pieces, turn)

    def end(self, step: int, ended_by: Sequence[dict[str, Any]]) -> None:
        """Notes in a checkpoint that the run ended there, and by what.

        Args:
            step: Whose checkpoint; one that is there and sound.
            ended_by: See `endings.ended_by`.

        Raises:
            OSError: when it could not be written; the checkpoint is as it was.
        """
        self.wait()
        if group().is_chief:
            ended = dataclasses.replace(self.manifest(step), ended_by=[*ended_by])
            ended.write(self.path(step))

    @property
    def is_writing(self) -> bool:
        """Whether a checkpoint is being written in the background."""
        return self._thread is not None and self._thread.is_alive()

    def wait(self) -> None:
        """Returns when no checkpoint is being written; raises what went wrong."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _write_in_background(self, *args: Any) -> None:
        try:
            if hasattr(os, "setpriority"):
                # On Linux, of this thread alone: training goes first.
                os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
            self._write(*args)
        except BaseException as error:  # handed to whoever calls `wait`
            self._error = error

    def _write(
        self, manifest: Manifest, pieces: Sequence[tensor_bundle.Piece], turn: int
    ) -> None:
        path = self.path(manifest.step)
        try:
            write(path, manifest, pieces, turn)
        except OSError:
            lock = self._lock
            removed = lock is not None and lock.is_own and not lock.is_in_place
            if not removed or group().count > 1:
                raise
            # The folder was removed meanwhile, and this checkpoint with it.
            self.claim()
            write(path, manifest, pieces, turn)
        self._damaged.discard(manifest.step)
        if group().is_chief:
            self._prune()

    def _prune(self) -> None:
        sound = [step for step in self.steps() if step not in self._damaged]
        kept = set(sound if self.max_to_keep is None else sound[-self.max_to_keep :])
        if self.monitor is not None:
            manifests = self._manifests()
            kept.add(self._best_of(manifests))
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
                folders.remove(self.directory, step)
            except OSError as error:
                # No reason to end a run: what it has written is whole.
                warnings.warn(
                    f"{self.path(step)} is no longer needed, and could not be removed "
                    f"({error.strerror}). Remove it by hand.",
                    stacklevel=2,
                )

    # -- restoring --------------------------------------------------------------------

    def restore(
        self,
        state: Mapping[str, Variable],
        step: int | None = None,
        dataset: ResumableDataset | None = None,
        rename: Sequence[tuple[str, str]] = (),
        missing: Sequence[str] = (),
        extra: Sequence[str] = (),
        accept: Callable[[Manifest], None] | None = None,
    ) -> Restored | None:
        """Restores the newest sound checkpoint, or that of `step`.

        A damaged one is passed over, with a warning, unless it was asked for by its
        step. Nothing changes before all that is needed was read and found whole.

        Args:
            state: What to restore; see `training_state`.
            step: Which one; None: the newest.
            dataset: Input that is to go on where it was.
            rename, missing, extra: What may differ; see `matching.match`.
            accept: Called with the manifest before anything is read; raises what it
                does not accept.

        Returns:
            What was done, or None when there is no checkpoint at all.

        Raises:
            CorruptCheckpointError: when there is none that is sound.
            CheckpointMismatchError: when it is a checkpoint of another model.
        """
        self.wait()
        damaged: dict[int, CorruptCheckpointError] = {}
        vanished: Counter[int] = Counter()
        while (candidate := self._agreed(step, damaged)) is not None:
            path = self.path(candidate)
            before = folders.identity(path)
            problem = None
            try:
                manifest = self.manifest(candidate)
                if accept is not None:
                    accept(manifest)
                restored, apply = self._read(
                    manifest, state, dataset, rename, missing, extra
                )
            except (CorruptCheckpointError, FileNotFoundError) as error:
                problem = error
            now = folders.identity(path)
            # (One that was removed when all of it had been read is whole.)
            stays = now == before or (problem is None and now is None)
            problem, stays = _what_all_say(problem, stays)
            if step is not None and isinstance(problem, FileNotFoundError):
                raise problem
            if not stays and vanished[candidate] < 3:
                # A run that goes on meanwhile has removed it, or written it again.
                vanished[candidate] += 1
                continue
            if problem is None:
                for assign in apply:
                    assign()
                return restored
            damaged[candidate] = CorruptCheckpointError(str(problem), problem.errno)
            self._damaged.add(candidate)
            if step is None:
                warnings.warn(
                    f"{problem}. Falling back to the checkpoint before it.",
                    stacklevel=2,
                )
        if damaged:
            numbers = [error.errno for error in damaged.values() if error.errno]
            raise CorruptCheckpointError(
                f"No checkpoint in {self.directory} is sound: "
                + "; ".join(map(str, damaged.values())),
                numbers[0] if numbers else None,
            )
        return None

    def _agreed(self, step: int | None, damaged: Container[int]) -> int | None:
        """The next checkpoint to try: of what the first process sees, who wrote it."""
        listed = self.steps()[::-1] if step is None else [step]
        wanted = (candidate for candidate in listed if candidate not in damaged)
        return json.loads(all_gather_text("step", json.dumps(next(wanted, None)))[0])

    def _read(
        self,
        manifest: Manifest,
        state: Mapping[str, Variable],
        dataset: ResumableDataset | None,
        rename: Sequence[tuple[str, str]],
        missing: Sequence[str],
        extra: Sequence[str],
    ) -> tuple[Restored, list[Any]]:
        folder = self.path(manifest.step)
        targets = {
            name: (tuple(array_of(v).shape), array_of(v).dtype.name)
            for name, v in state.items()
        }
        matched = match(targets, manifest.arrays, rename, missing, extra)
        apply = []
        for name, source in matched.sources.items():
            read = array_reader(folder, manifest, source)
            if name in matched.repeated:
                read = repeated(read)
            apply.append(load(state[name], read))
        if dataset is not None:
            apply.append(_position(folder, manifest, dataset))
        return Restored(folder, manifest, matched), apply


def array_reader(folder: Path, manifest: Manifest, name: str) -> Any:
    """A function that reads a region of an array of a checkpoint."""
    array = manifest.arrays[name]
    dtype = tf.as_dtype(array.dtype)

    def read(region: Any) -> tf.Tensor:
        return tensor_bundle.read(folder / "state", name, array.shape, region, dtype)

    return read


def _position(folder: Path, manifest: Manifest, dataset: ResumableDataset) -> Any:
    batches = manifest.data["batches"]
    if batches is None:
        raise ValueError(
            f"{folder} was saved without dataset=, so there is no position to go to."
        )
    saved = None
    if manifest.data["position"] == "iterator":
        if manifest.processes != group().count and dataset.position == "iterator":
            raise ValueError(
                f"{folder} was written by {manifest.processes} processes, each with "
                f"the state of its own input; this run has {group().count}. Read the "
                "position as a count: ResumableDataset(..., position='count')."
            )
        if dataset.position == "iterator":
            saved = tensor_bundle.read(
                folder / "state",
                tensor_bundle.position_name(group().index),
                (),
                (),
                tf.variant,
            )
    dataset.require(saved)
    return lambda: dataset.restore(batches, saved)


def _what_all_say(
    problem: CorruptCheckpointError | FileNotFoundError | None, stays: bool
) -> tuple[CorruptCheckpointError | FileNotFoundError | None, bool]:
    """What is wrong with a checkpoint in any process, and whether it is still there."""
    mine = {
        "problem": "" if problem is None else str(problem),
        "absent": isinstance(problem, FileNotFoundError),
        "errno": None if problem is None else problem.errno,
        "stays": stays,
    }
    said = all_gather_text("restore", json.dumps(mine), WRITE_TIMEOUT_SECONDS)
    told = list(map(json.loads, said))
    stays = all(one["stays"] and not one["absent"] for one in told)
    for one in told:
        if one["problem"]:
            kind = FileNotFoundError if one["absent"] else CorruptCheckpointError
            found = kind(one["problem"])
            found.errno = one["errno"]
            return found, stays
    return None, stays


def _global_seed() -> list[int] | None:
    state = global_seed_state()
    return None if state is None else [int(word) for word in state.numpy()]


def _mesh_of(state: Mapping[str, Variable]) -> dict[str, int] | None:
    for variable in state.values():
        mesh = getattr(array_of(variable), "mesh", None)
        if mesh is not None:
            return dict(zip(mesh.dim_names, mesh.shape(), strict=True))
    return None
