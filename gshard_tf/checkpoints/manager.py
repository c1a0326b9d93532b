"""`CheckpointManager`: saves, keeps and restores the checkpoints of a run."""

import dataclasses
import functools
import os
import shutil
import threading
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from gshard_tf.checkpoints import step_folders, tensor_bundle
from gshard_tf.checkpoints.dataset import ResumableDataset
from gshard_tf.checkpoints.manifest import Manifest
from gshard_tf.checkpoints.matching import match
from gshard_tf.checkpoints.restore import Restored, restore
from gshard_tf.checkpoints.retention import best_step, prune, read_manifests
from gshard_tf.checkpoints.snapshot import describe, snapshot
from gshard_tf.checkpoints.training_state import Variable
from gshard_tf.checkpoints.writer import write
from gshard_tf.compat.keras_seeds import global_seed_state
from gshard_tf.compat.keras_variables import backend_variable
from gshard_tf.io.locks import FolderLock
from gshard_tf.io.paths import local_path, make_folder
from gshard_tf.runtime.process_group import group, next_collective_id
from gshard_tf.sharding.mesh import axis_sizes

# The managers of this process that may write, each to its own directory.
_OWNERS: "weakref.WeakSet[CheckpointManager]" = weakref.WeakSet()


class CheckpointManager:
    """The checkpoints of one run, in one directory.

    Each is a folder `step-NNNNNNNNNN` that appears under its name only when it is
    complete and on the disk. A process that dies at any moment leaves at most a hidden
    folder, which the next one removes.

    Args:
        directory: A path on a local or mounted disk; `~` is expanded. With several
            processes: on a disk that all of them see.
        max_to_keep: The number of newest checkpoints to keep; None: all.
        monitor: A metric of `logs` by which the best one is kept as well.
        mode: `"min"` or `"max"`: whether a lower or a higher `monitor` is better.
        asynchronous: Whether `save` returns once the values are copied, and a thread
            writes them at the lowest priority while training continues. The next `save`
            or `wait` raises the errors of that thread.

    Raises:
        ValueError: when an argument is none of these, or the directory is remote,
            `gs://` for example.
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
        # Locked until `close`, or the end of this object.
        self._lock: FolderLock | None = None
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._corrupt: set[int] = set()

    # -- listing -----------------------------------------------------------------

    def steps(self) -> list[int]:
        """Returns the steps that have a complete checkpoint, oldest first."""
        return step_folders.steps(self.directory)

    def path(self, step: int) -> Path:
        """Returns the folder of a step's checkpoint."""
        return step_folders.step_path(self.directory, step)

    def manifest(self, step: int) -> Manifest:
        """Returns the manifest of a step's checkpoint.

        Raises:
            CorruptCheckpointError: when it is damaged, or cannot be read.
            FileNotFoundError: when that step has none.
        """
        return Manifest.read(self.path(step), step)

    def best(self) -> int | None:
        """Returns the step of the best checkpoint, by `monitor`; None without one."""
        return best_step(read_manifests(self.directory), self.monitor, self.mode)

    # -- saving ---------------------------------------------------------------------

    def claim(self) -> None:
        """Locks the directory for this process until it ends, or `close`.

        Links are followed, and the lock holds under every name of the directory. A
        forked child of this process does not have it. Where the directory was removed
        or replaced since it was locked, this warns, and makes it again.

        Raises:
            AlreadyRunningError: when another run writes there.
            FileExistsError: when it is a file, or a link to a path that does not exist,
                or a file has the name of a step's hidden folder.
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
                "to it. Its checkpoints are gone. The run continues in a new one.",
                stacklevel=2,
            )
        make_folder(self.directory)
        for other in list(_OWNERS):
            if other is not self and other.owns(self.directory):
                # It belongs to a `fit` of this process that was interrupted.
                other.close()
        lock = FolderLock(self.directory)
        try:
            # A killed run left them half-written. (It cannot run: it has no lock.)
            for leftover in step_folders.leftovers(self.directory):
                shutil.rmtree(leftover, ignore_errors=True)
        except BaseException:
            lock.release()
            raise
        self._lock = lock
        _OWNERS.add(self)

    def owns(self, folder: Path) -> bool:
        """Returns whether this manager holds the lock of a folder."""
        lock = self._lock
        return lock is not None and lock.is_own and lock.is_of(folder)

    def close(self) -> None:
        """Waits until the checkpoint is written, and unlocks the directory."""
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
                checkpoints are unchanged.
        """
        self.wait()
        self.claim()
        processes = group()
        position = None if dataset is None else dataset.state()
        shards = snapshot(state, processes.is_chief)
        if position is not None and position["iterator"] is not None:
            iterator = position.pop("iterator")
            name = tensor_bundle.position_name(processes.index)
            shards.append(tensor_bundle.ArrayShard(name, (), (), iterator))
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
        save_id = next_collective_id()
        if self.asynchronous:
            self._thread = threading.Thread(
                target=self._write_in_background, args=(manifest, shards, save_id)
            )
            self._thread.start()
        else:
            self._write(manifest, shards, save_id)

    def end(self, step: int, ended_by: Sequence[dict[str, Any]]) -> None:
        """Records in a checkpoint that the run ended there, and by which callbacks.

        Args:
            step: The step of an existing, sound checkpoint.
            ended_by: See `callbacks.finished_runs.ended_by`.

        Raises:
            OSError: when it could not be written; the checkpoint is unchanged.
        """
        self.wait()
        if group().is_chief:
            ended = dataclasses.replace(self.manifest(step), ended_by=[*ended_by])
            ended.write(self.path(step))

    @property
    def is_writing(self) -> bool:
        """True while a thread is writing a checkpoint."""
        return self._thread is not None and self._thread.is_alive()

    def wait(self) -> None:
        """Returns when no checkpoint is being written; raises the error of a save."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _write_in_background(self, *args: Any) -> None:
        try:
            if hasattr(os, "setpriority"):
                # On Linux, of this thread alone: training has priority.
                os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
            self._write(*args)
        except BaseException as error:  # `wait` raises it
            self._error = error

    def _write(
        self,
        manifest: Manifest,
        shards: Sequence[tensor_bundle.ArrayShard],
        save_id: int,
    ) -> None:
        path = self.path(manifest.step)
        try:
            write(path, manifest, shards, save_id)
        except OSError:
            lock = self._lock
            removed = lock is not None and lock.is_own and not lock.is_in_place
            if not removed or group().count > 1:
                raise
            # The folder was removed meanwhile, and this checkpoint with it.
            self.claim()
            write(path, manifest, shards, save_id)
        self._corrupt.discard(manifest.step)
        if group().is_chief:
            prune(
                self.directory,
                self.max_to_keep,
                self.monitor,
                self.mode,
                self._corrupt,
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

        A damaged one is passed over, with a warning, unless `step` names it. No
        variable changes before all arrays are read and their checksums verified.

        Args:
            state: The variables to restore; see `training_state`.
            step: The step of the checkpoint; None: the newest.
            dataset: The input to move to its position.
            rename: `(pattern, source)` pairs: a variable whose whole name matches the
                pattern takes the array of the source; see `matching.match`.
            missing: Patterns for variables that the checkpoint need not have.
            extra: Patterns for arrays that need not be taken.
            accept: Called with the manifest before any array is read; raises where it
                does not accept it.

        Returns:
            The result, or None when there is no checkpoint at all.

        Raises:
            CorruptCheckpointError: when no checkpoint is sound.
            CheckpointMismatchError: when it is a checkpoint of another model.
        """
        self.wait()
        matcher = functools.partial(match, rename=rename, missing=missing, extra=extra)
        return restore(
            self.directory, state, step, dataset, matcher, accept, self._corrupt
        )


def _global_seed() -> list[int] | None:
    state = global_seed_state()
    return None if state is None else [int(word) for word in state.numpy()]


def _mesh_of(state: Mapping[str, Variable]) -> dict[str, int] | None:
    for variable in state.values():
        mesh = getattr(backend_variable(variable), "mesh", None)
        if mesh is not None:
            return axis_sizes(mesh)
    return None
