"""`model.fit` that can be stopped anywhere and goes on where it was."""

import json
import warnings
import weakref
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import Any

import keras

from gshard_tf.callbacks.finished_runs import ended_by, would_end_again
from gshard_tf.callbacks.resume_warnings import (
    learning_rates,
    of_the_callbacks,
    of_the_data,
    of_the_rates,
)
from gshard_tf.checkpoints.dataset import ResumableDataset
from gshard_tf.checkpoints.manager import CheckpointManager, Restored, array_reader
from gshard_tf.checkpoints.manifest import Manifest
from gshard_tf.checkpoints.naming import (
    Variable,
    array_of,
    section,
    training_state,
)
from gshard_tf.checkpoints.snapshot import load
from gshard_tf.compat.keras_epochs import RunningFit, running_fit
from gshard_tf.compat.keras_seeds import give_global_seed_generator, global_seed_state
from gshard_tf.runtime.termination import Termination
from gshard_tf.spmd.keras_step import complete


class CheckpointCallback(keras.callbacks.Callback):
    """Saves checkpoints while `fit` runs, and goes on from the newest one.

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
    and trains nothing. Without it, or with other settings, it goes on.

    SIGTERM, by which schedulers stop a run, ends it at the end of a step, with a
    checkpoint, before any validation: `fit` raises `SystemExit` with the code 75, in
    all processes of the run.

    Args:
        directory: Where the checkpoints are, on a local or mounted disk; or a
            `CheckpointManager`, which has `max_to_keep`, `monitor`, `mode` and
            `asynchronous` of its own.
        save_every: How many steps lie between two of them; None: only at the ends of
            epochs, which are saved in any case.
        dataset: What `fit` trains on. Without it, an epoch that was under way goes on
            with whatever `fit` is given. Without `steps_per_epoch` an epoch is a pass
            over all data: the batches before are read and dropped, which is exact
            where their order is the same each time. With it, that is exact where you
            start the data at step `CheckpointManager(directory).steps()[-1]`
            yourself, or where you save only at the ends of epochs and the data does
            not depend on the epoch. Where the data is known to be elsewhere, `fit`
            warns.
        max_to_keep: How many of the newest are kept; None: all.
        monitor: A metric, such as `"val_loss"`, by which the best one is kept too. NaN
            is never best. The first epoch without it warns.
        mode: `"min"` or `"max"`: which value of `monitor` is better.
        config: Your own configuration, of JSON's types; restoring a run that was begun
            with another one is an error.
        extra_state: Variables and optimizers that the model does not know of, by name.
        resume: Whether to go on from the newest checkpoint; else to begin anew is an
            error where there are any.
        asynchronous: See `CheckpointManager`.
        grace: How many seconds after SIGTERM the process has ended, come what may; a
            little less than the scheduler leaves it. None: leaves the signal alone.
            In a thread that is not the main one, the signal is left alone, too.

    Attributes:
        step: How many steps were done.
        restored: What was restored at the beginning, or None.

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
        # Steps that an epoch has, those done in this one, and those of them that were
        # done before the run was stopped.
        self._length: int | None = None
        self._epoch_step = 0
        self._done_before = 0
        # Of this epoch, which was left in its middle, and is saved as that.
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
        # Those of training, while validation uses them.
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
        self._listen()

    def _begin(self) -> None:
        if not self.resume and self.manager.steps():
            raise ValueError(
                f"There are checkpoints in {self.manager.directory}, and resume=False "
                "asks for a new run. Name another folder."
            )
        if self.dataset is not None:
            # Metrics too: outside a strategy, Keras makes them in the first step.
            complete(self.model, self.dataset.dataset.element_spec, "train")
        compiled = learning_rates(self._state())
        self.restored = self.manager.restore(
            self._state(), dataset=self.dataset, accept=self._check_config
        )
        if self.restored is None:
            if self.dataset is not None:
                # Keras has looked at a batch, to build the metrics.
                self.dataset.restart()
            return
        found = self.restored.manifest
        if found.global_seed is not None:
            with self.model.distribute_strategy.scope():
                give_global_seed_generator(found.global_seed)
        self.step = found.step
        self._done_before = found.epoch_step
        # Private API, of Keras's own BackupAndRestore: where `fit` begins. On an
        # upgrade, check that `fit` reads it after `on_train_begin`.
        self.model._initial_epoch = found.epoch
        fit = running_fit(self.model)
        if fit is not None and would_end_again(fit, found.ended_by):
            self.model._initial_epoch = max(found.epoch, self.params["epochs"])
            warnings.warn(
                f"The run in {self.manager.directory} is finished: EarlyStopping "
                f"ended it at step {found.step}, after {found.epoch} epochs. Nothing "
                "is trained, and the model is as that epoch left it. To go on, give "
                "fit another patience, or no EarlyStopping.",
                stacklevel=2,
            )
        else:
            self._warn_of_what_begins_anew(fit, compiled)

    def _warn_of_what_begins_anew(
        self, fit: RunningFit | None, compiled: Mapping[str, float]
    ) -> None:
        found = self.restored.manifest
        said = [of_the_rates(fit, compiled, learning_rates(self._state()))]
        if fit is not None:
            said.append(of_the_callbacks(fit, found))
            if self.dataset is None:
                said.append(of_the_data(fit, found))
        for sentence in filter(None, said):
            warnings.warn(sentence, stacklevel=2)

    def _check_config(self, manifest: Manifest) -> None:
        # As JSON would give it back.
        if manifest.config != json.loads(json.dumps(self.config)):
            raise ValueError(
                f"The run in {self.manager.directory} was begun with config="
                f"{manifest.config!r}. Received: config={self.config!r}"
            )

    def on_epoch_begin(self, epoch: int, logs: dict | None = None) -> None:
        self._leave_if_told()
        self._epoch, self._epoch_step = epoch, self._done_before
        self._left_early = False
        fit = running_fit(self.model)
        self._length = self.params.get("steps") if fit is None else fit.steps
        # Without `steps_per_epoch`, the last execution has what is left of the data.
        self._reads_all = fit is not None and fit.reads_all
        if self._done_before:
            self._check_goes_on(fit)
            fit.begin_epoch_at(self._done_before, self.restored.manifest.logs)
            # Keras has just reset the metrics; half of this epoch is in them.
            self._restore_metrics()
        self.model._initial_epoch = None

    def _check_goes_on(self, fit: RunningFit | None) -> None:
        """Raises `ValueError` unless the epoch can go on where it was."""
        done, length = self._done_before, self._length
        if fit is None:
            raise ValueError(
                f"The run was stopped {done} steps into an epoch, where only Keras's "
                "own `fit` can go on. Received: a loop that calls callbacks by itself"
            )
        endless = self.dataset is not None and length is None
        over = length is not None and length <= done
        if over and length == done and self.restored.manifest.awaits_end:
            over = False
        if endless or over:
            raise ValueError(
                f"The run was stopped {done} steps into an epoch. Go on with the same "
                f"fit(steps_per_epoch=...). Received: steps_per_epoch={length}"
            )
        if done % fit.steps_per_execution:
            raise ValueError(
                f"The run was stopped {done} steps into an epoch. Go on with the same "
                "compile(steps_per_execution=...), or one that divides that. Received: "
                f"steps_per_execution={fit.steps_per_execution}"
            )

    def _restore_metrics(self) -> None:
        folder, manifest = self.restored.folder, self.restored.manifest
        for name, variable in self._state().items():
            if section(name) == "metrics" and name in manifest.arrays:
                load(variable, array_reader(folder, manifest, name))()

    def roll_back(self) -> int:
        """Restores the newest checkpoint, but not the position; returns its step.

        Raises:
            ValueError: when there is none.
        """
        state = {n: v for n, v in self._state().items() if section(n) != "metrics"}
        restored = self.manager.restore(state)
        if restored is None:
            raise ValueError(
                f"There is no checkpoint in {self.manager.directory} to roll back to."
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
        # Then the other callbacks, of which a guard may have something to say.
        self._leaving = self._is_due()

    def _has_steps_left(self) -> bool:
        return self._length is None or self._epoch_step < self._length

    def on_train_batch_begin(self, batch: int, logs: dict | None = None) -> None:
        self._leave_if_told(or_now=True)

    def on_test_batch_begin(self, batch: int, logs: dict | None = None) -> None:
        self._leave_if_told(or_now=True)

    def on_test_batch_end(self, batch: int, logs: dict | None = None) -> None:
        self._leaving = self._is_due()

    def on_test_begin(self, logs: dict | None = None) -> None:
        self._leave_if_told()
        if self._termination is not None:
            self._metrics = {
                name: array_of(variable).numpy()
                for name, variable in self._state().items()
                if section(name) == "metrics"
            }
        # Validation resets the metrics; half of an epoch that was left is in them.
        self._save_if_left_early(None)

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        self._metrics = None
        self._save_if_left_early(logs)
        self._done_before = 0
        monitor = self.manager.monitor
        if (
            monitor is not None
            and monitor not in (logs or {})
            and not self._warned_of_best
        ):
            self._warned_of_best = True
            warnings.warn(
                "No checkpoint of this epoch can be the best one: "
                f"monitor={monitor!r} is not among the logs. Received: "
                f"{sorted(logs or {})}",
                stacklevel=2,
            )
        if not self._left_early:
            self._save(epoch + 1, 0, logs)

    def _save_if_left_early(self, logs: dict | None) -> None:
        """Saves an epoch that `stop_training` ended as one that is to go on."""
        fit = running_fit(self.model)
        if self._left_early or fit is None or not self.model.stop_training:
            return
        if self._epoch_step and self._has_steps_left() and fit.left_early():
            self._left_early = True
            self._save(self._epoch, self._epoch_step, logs)

    def on_train_end(self, logs: dict | None = None) -> None:
        # Where no epoch was left to begin with.
        self.model._initial_epoch = None
        fit = running_fit(self.model)
        ended = [] if fit is None or self._left_early else ended_by(fit, self._epoch)
        if ended:
            self.manager.end(self.step, ended)
        self.manager.close()
        self._leave_if_told(or_now=True)
        if self._termination is not None:
            self._termination.close()

    # -- SIGTERM ----------------------------------------------------------------------

    def _listen(self) -> None:
        self._leaving, self._metrics, self._saved_at = False, None, self.step
        if self.grace is None:
            return
        in_fit = running_fit(self.model) is not None
        # A loop of one's own that an exception ended lets go of this callback.
        callback = weakref.ref(self)

        def is_running(frame: FrameType | None) -> bool:
            owner = callback()
            return owner is not None and (
                not in_fit or running_fit(owner.model, frame) is not None
            )

        def progress() -> str:
            owner = callback()
            newest = 0 if owner is None else owner._newest()
            return f"The newest checkpoint is of step {newest}."

        self._termination = Termination(self.grace, is_running, progress)
        self._termination.start()

    def _newest(self) -> int:
        return max(self.manager.steps(), default=0)

    def _is_due(self) -> bool:
        return self._termination is not None and self._termination.is_due()

    def _leave_if_told(self, or_now: bool = False) -> None:
        """Saves and ends the run where SIGTERM asked for it.

        Args:
            or_now: Whether a step is about to begin, so that it may be asked to
                leave before.
        """
        termination = self._termination
        if termination is None:
            return
        if not self._leaving and (not or_now or termination.may_begin()):
            return
        if self._epoch_step and self._saved_at != self.step:
            for name, value in (self._metrics or {}).items():
                array_of(self._state()[name]).assign(value)
            self._save(
                self._epoch,
                self._epoch_step,
                self._logs,
                awaits_end=not self._has_steps_left(),
            )
        self.manager.close()
        self._termination = None
        saved = f"the run is saved at step {self.step}."
        termination.leave(saved if self.step else "no step was done yet.")

    # ---------------------------------------------------------------------------------

    def _save(
        self,
        epoch: int,
        epoch_step: int,
        logs: dict | None,
        awaits_end: bool = False,
    ) -> None:
        state = self._state()
        if not self._saved_before:
            _check_complete(self.model, state)
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


def _check_complete(model: keras.Model, state: Mapping[str, Variable]) -> None:
    """Raises `ValueError` when the training step changes what is not in `state`."""
    known = {id(array_of(variable)) for variable in state.values()}
    iterations = array_of(model.optimizer.iterations)
    for program in getattr(model.distribute_strategy, "programs", []):
        changed = [program.step.captures[i] for i in program.step.updates]
        # Other models of the strategy have steps too, and evaluation.
        if any(variable is iterations for variable in changed):
            # The manifest has the state of Keras's global seed generator.
            known.add(id(global_seed_state()))
            forgotten = [
                v.path
                for v in changed
                if id(v) not in known and id(getattr(v, "variable", v)) not in known
            ]
            if forgotten:
                raise ValueError(
                    "The training step changes variables that the model does not know "
                    "of, so a checkpoint would lack them. Give them to "
                    "CheckpointCallback(extra_state={name: variable or optimizer}). "
                    f"Received: {forgotten}"
                )


def _description(model: keras.Model) -> Any:
    """What Keras would make the model from again, or None."""
    try:
        return keras.saving.serialize_keras_object(model)
    except (NotImplementedError, TypeError):
        # What Keras raises for a model, or a part of one, without a `get_config`.
        return None
