"""`CheckpointCallback`: saves checkpoints while `fit` runs, and resumes from them."""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import keras

from gshard_tf.callbacks.completeness import check_state_is_complete
from gshard_tf.callbacks.finished_runs import ended_by
from gshard_tf.callbacks.keras_3 import Keras3Callback
from gshard_tf.callbacks.preemption import listen_for_sigterm
from gshard_tf.callbacks.resume import check_epoch_resumes, restore_run
from gshard_tf.checkpoints.dataset import ResumableDataset
from gshard_tf.checkpoints.manager import CheckpointManager
from gshard_tf.checkpoints.restore import Restored, array_reader
from gshard_tf.checkpoints.snapshot import stage
from gshard_tf.checkpoints.training_state import Variable, section, training_state
from gshard_tf.compat.keras_epochs import running_fit, start_at_epoch
from gshard_tf.compat.keras_variables import backend_variable
from gshard_tf.runtime.termination import Termination


class CheckpointCallback(Keras3Callback):
    """Saves checkpoints while `fit` runs, and resumes from the newest one.

    Give the same command again after a stop: it restores weights, optimizer, seeds,
    metrics and the position in the data, and trains the steps that are left. On the
    same mesh the losses are those of a run that was never stopped, to the bit.

    ```python
    data = gshard_tf.ResumableDataset(dataset.repeat())
    model.fit(data.dataset, epochs=10, steps_per_epoch=1000,
              callbacks=[gshard_tf.CheckpointCallback("run", 200, data)])
    ```

    Put it first among the callbacks: the others then see the restored model.

    A run that `EarlyStopping` ended is finished: with the same settings, `fit` warns
    and trains nothing. Without it, or with other settings, the run resumes.

    SIGTERM, by which schedulers stop a run, ends it at the end of a step, with a
    checkpoint, before any validation: `fit` raises `SystemExit` with the code 75, in
    all processes of the run.

    Args:
        directory: Where the checkpoints are, on a local or mounted disk; or a
            `CheckpointManager`, which has `max_to_keep`, `monitor`, `mode` and
            `asynchronous` of its own.
        save_every: The number of steps between two of them; None: only at the ends of
            epochs, which are saved in any case.
        dataset: The input of `fit`. Without it, an epoch that was under way resumes
            with the data that `fit` is given. Without `steps_per_epoch` an epoch is a
            pass over all data: the batches before are read and dropped, which is exact
            where their order is the same each time. With it, that is exact where you
            start the data at step `CheckpointManager(directory).steps()[-1]`
            yourself, or where you save only at the ends of epochs and the data does
            not depend on the epoch. Where the data is known to be elsewhere, `fit`
            warns.
        max_to_keep: The number of newest checkpoints to keep; None: all.
        monitor: A metric, such as `"val_loss"`, by which the best one is kept too. NaN
            is never best. The first epoch without it warns.
        mode: `"min"` or `"max"`: whether a lower or a higher `monitor` is better.
        config: Your own configuration, of JSON's types; to restore a run that has
            another one is an error.
        extra_state: Variables and optimizers that the model does not know of, by name.
        resume: Whether to resume from the newest checkpoint; if not, to begin anew is
            an error where there are any.
        asynchronous: See `CheckpointManager`.
        grace: Seconds from SIGTERM to the end of the process in any case; a little less
            than the scheduler leaves it. None: the signal keeps its handler, as it does
            in a thread that is not the main one.

    Attributes:
        step: The number of steps that were done.
        restored: The result of the restore at the beginning, or None.

    Raises:
        ValueError: when `save_every` or `grace` is no positive number, or `directory`
            is remote.
    """

    def __init__(
        self,
        directory: str | Path | CheckpointManager,
        save_every: int | None = None,
        dataset: ResumableDataset | None = None,
        max_to_keep: int | None = 3,
        monitor: str | None = None,
        mode: str = "min",
        config: Any = None,
        extra_state: Mapping[str, Variable | keras.optimizers.Optimizer] | None = None,
        resume: bool = True,
        asynchronous: bool = True,
        grace: float | None = 30.0,
    ):
        super().__init__()
        if save_every is not None and (isinstance(save_every, bool) or save_every < 1):
            raise ValueError(
                "`save_every` must be at least 1, or None. Received: "
                f"save_every={save_every!r}"
            )
        if grace is not None and not grace > 0:
            raise ValueError(
                f"`grace` must be more than 0 s, or None. Received: grace={grace!r}"
            )
        if not isinstance(directory, CheckpointManager):
            directory = CheckpointManager(
                directory, max_to_keep, monitor, mode, asynchronous
            )
        self.manager = directory
        self.save_every = save_every
        self.dataset = dataset
        self.config = config
        self.extra_state = extra_state
        self.resume = resume
        self.step = 0
        self.restored: Restored | None = None
        self._epoch = 0
        # The steps of an epoch, those done in this one, and those of them that were
        # done before the run was stopped.
        self._length: int | None = None
        self._epoch_step = 0
        self._done_before = 0
        # Whether this epoch was left in its middle, and is saved as that.
        self._left_early = False
        self._saved_before = False
        self._warned_of_best = False
        self.grace = grace
        self._termination: Termination | None = None
        # Whether SIGTERM made the last step the last one.
        self._leaving = False
        # The step of the last checkpoint of this `fit`.
        self._saved_at: int | None = None
        self._logs: dict | None = None
        # The metrics of training, while validation uses their variables.
        self._metrics: dict[str, Any] | None = None

    def _state(self) -> dict[str, Variable]:
        return training_state(self.model, self.extra_state)

    # -- restoring ----------------------------------------------------------------

    def on_train_begin(self, logs: dict | None = None) -> None:
        self.manager.claim()
        try:
            self._begin()
        except BaseException:
            self.manager.close()
            raise
        self._leaving, self._metrics, self._saved_at = False, None, self.step
        if self.grace is not None:
            self._termination = listen_for_sigterm(self, self.grace)

    def _begin(self) -> None:
        if not self.resume and self.manager.steps():
            raise ValueError(
                f"`directory` must have no checkpoints where resume=False asks for a "
                f"new run. Received: directory={self.manager.directory}"
            )
        manager, model, dataset = self.manager, self.model, self.dataset
        self.restored = restore_run(
            manager, model, self._state, dataset, self.config, self.params
        )
        if self.restored is not None:
            self.step = self.restored.manifest.step
            self._done_before = self.restored.manifest.epoch_step

    def on_epoch_begin(self, epoch: int, logs: dict | None = None) -> None:
        self._leave_if_asked()
        self._epoch, self._epoch_step = epoch, self._done_before
        self._left_early = False
        fit = running_fit(self.model)
        self._length = self.params.get("steps") if fit is None else fit.steps
        # Without `steps_per_epoch`, the last execution has what is left of the data.
        self._reads_all = fit is not None and fit.reads_all
        if self._done_before and self.restored is not None:
            manifest = self.restored.manifest
            fit = check_epoch_resumes(
                fit, manifest, self._length, self.dataset is not None
            )
            fit.begin_epoch_at(self._done_before, manifest.logs)
            # Keras has just reset the metrics; half of this epoch is in them.
            self._restore_metrics(self.restored)
        start_at_epoch(self.model, None)

    def _restore_metrics(self, restored: Restored) -> None:
        folder, manifest = restored.folder, restored.manifest
        for name, variable in self._state().items():
            if section(name) == "metrics" and name in manifest.arrays:
                stage(variable, array_reader(folder, manifest, name))()

    def roll_back(self) -> int:
        """Restores the newest checkpoint, but not the position; returns its step.

        Raises:
            ValueError: when there is none.
        """
        state = {n: v for n, v in self._state().items() if section(n) != "metrics"}
        restored = self.manager.restore(state)
        if restored is None:
            raise ValueError(
                "A run cannot be rolled back before its first checkpoint. Received: "
                f"no checkpoint in {self.manager.directory}"
            )
        return restored.manifest.step

    # -- saving -----------------------------------------------------------------------

    def on_train_batch_end(self, batch: int, logs: dict | None = None) -> None:
        self._logs = logs
        # `batch` is the last one of an execution, which may have several steps, and go
        # beyond the end of the epoch.
        done = batch + 1
        if self._reads_all and self._length is not None:
            done = min(done, self._length)
        steps = done - self._epoch_step
        self._epoch_step = done
        self.step += steps
        crossed = self.save_every and self.step // self.save_every > (
            (self.step - steps) // self.save_every
        )
        # The last step of an epoch is saved after its validation.
        if crossed and self._has_steps_left():
            self._save(self._epoch, self._epoch_step, logs)
        # The run leaves after the other callbacks: a guard may roll the model back.
        self._leaving = self._is_due()

    def _has_steps_left(self) -> bool:
        return self._length is None or self._epoch_step < self._length

    def on_train_batch_begin(self, batch: int, logs: dict | None = None) -> None:
        self._leave_if_asked(or_now=True)

    def on_test_batch_begin(self, batch: int, logs: dict | None = None) -> None:
        self._leave_if_asked(or_now=True)

    def on_test_batch_end(self, batch: int, logs: dict | None = None) -> None:
        self._leaving = self._is_due()

    def on_test_begin(self, logs: dict | None = None) -> None:
        self._leave_if_asked()
        if self._termination is not None:
            self._metrics = {
                name: backend_variable(variable).numpy()
                for name, variable in self._state().items()
                if section(name) == "metrics"
            }
        # Validation resets the metrics; half of an epoch that was left is in them.
        self._save_if_left_early(None)

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        self._metrics = None
        self._save_if_left_early(logs)
        self._done_before = 0
        self._warn_if_unmonitored(logs or {})
        if not self._left_early:
            self._save(epoch + 1, 0, logs)

    def _warn_if_unmonitored(self, logs: Mapping[str, Any]) -> None:
        monitor = self.manager.monitor
        if monitor is None or monitor in logs or self._warned_of_best:
            return
        self._warned_of_best = True
        warnings.warn(
            f"No checkpoint of this epoch can be the best one: monitor={monitor!r} is "
            f"not among the logs. Received: {sorted(logs)}",
            stacklevel=3,
        )

    def _save_if_left_early(self, logs: dict | None) -> None:
        """Saves an epoch that `stop_training` ended as one to be resumed."""
        fit = running_fit(self.model)
        if self._left_early or fit is None or not self.model.stop_training:
            return
        if self._epoch_step and self._has_steps_left() and fit.left_early():
            self._left_early = True
            self._save(self._epoch, self._epoch_step, logs)

    def on_train_end(self, logs: dict | None = None) -> None:
        # Also where `fit` had no epoch left to begin.
        start_at_epoch(self.model, None)
        fit = running_fit(self.model)
        ended = [] if fit is None or self._left_early else ended_by(fit, self._epoch)
        if ended:
            self.manager.end(self.step, ended)
        self.manager.close()
        self._leave_if_asked(or_now=True)
        if self._termination is not None:
            self._termination.close()

    # -- SIGTERM ----------------------------------------------------------------------

    def _is_due(self) -> bool:
        return self._termination is not None and self._termination.is_due()

    def _leave_if_asked(self, or_now: bool = False) -> None:
        """Saves and ends the run where SIGTERM asked for that.

        Args:
            or_now: Whether a step is about to begin, so that the run may leave before
                it.
        """
        termination = self._termination
        if termination is None:
            return
        if not self._leaving and (not or_now or termination.may_begin()):
            return
        if self._epoch_step and self._saved_at != self.step:
            for name, value in (self._metrics or {}).items():
                backend_variable(self._state()[name]).assign(value)
            awaits_end = not self._has_steps_left()
            self._save(self._epoch, self._epoch_step, self._logs, awaits_end)
        self.manager.close()
        self._termination = None
        saved = f"the run is saved at step {self.step}."
        termination.leave(saved if self.step else "no step was done yet.")

    def _save(
        self, epoch: int, epoch_step: int, logs: dict | None, awaits_end: bool = False
    ) -> None:
        state = self._state()
        if not self._saved_before:
            check_state_is_complete(self.model, state)
            self._saved_before = True
        self.manager.save(
            state,
            step=self.step,
            epoch=epoch,
            epoch_step=epoch_step,
            logs=logs,
            dataset=self.dataset,
            config=self.config,
            model=_description(self.model),
            awaits_end=awaits_end,
        )
        self._saved_at = self.step


def _description(model: keras.Model) -> Any:
    """The configuration from which Keras makes the model again, or None."""
    try:
        return keras.saving.serialize_keras_object(model)
    except (NotImplementedError, TypeError):
        # Keras raises them for a model, or a part of one, without a `get_config`.
        return None
