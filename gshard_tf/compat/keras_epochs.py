"""The running `fit` of Keras: its callbacks, and its position in an epoch.

Keras shows a callback neither the other callbacks nor the reason for which an epoch
ended, and cannot begin an epoch in its middle: stopping the training and starting it
again leaves a `PyDataset` within an epoch for good.
"""

import inspect
from collections.abc import Iterator, Mapping
from types import FrameType
from typing import Any

import keras

# Relies on: the loop of `fit`. On an upgrade, watch: its locals are still `self`,
# `callbacks` (a `CallbackList` before `on_train_begin`, which goes through its list by
# index and gives all of it the same `logs`) and `epoch_iterator`; it begins each epoch
# by `iter(epoch_iterator)`, after `on_epoch_begin`; `_enumerate_iterator` is the
# generator of an epoch's executions, `(first step, last step, batches)`, and calls the
# adapter's `on_epoch_end` when it is exhausted; an epoch whose data ran out leaves
# `_num_batches` and no `_current_iterator`; and an epoch without steps makes its logs
# by `_get_metrics_result_or_logs({})`.
from keras.src.backend.tensorflow.trainer import TensorFlowTrainer, TFEpochIterator

# Relies on: the adapters of `fit`'s data. On an upgrade, watch: arrays shuffled by
# TensorFlow's global seed have one order in all epochs, and whether they and a
# `PyDataset` are shuffled is in `_shuffle` and `shuffle`.
from keras.src.trainers.data_adapters import ArrayDataAdapter, GeneratorDataAdapter

# Relies on: `context.global_seed`; `tf.random.set_seed` has no public reader. On an
# upgrade, watch: it still returns None without a seed.
from tensorflow.python.eager import context

_FIT = inspect.unwrap(TensorFlowTrainer.fit).__code__


class RunningFit:
    """A call of `fit` that has not returned.

    Attributes:
        callbacks: All of its callbacks.
    """

    def __init__(
        self,
        model: keras.Model,
        callbacks: list[keras.callbacks.Callback],
        epochs: TFEpochIterator,
    ):
        self.callbacks = callbacks
        self._model = model
        self._epochs = epochs

    @property
    def steps(self) -> int | None:
        """The number of steps in an epoch; None as long as it is unknown."""
        return self._epochs.num_batches

    @property
    def steps_per_execution(self) -> int:
        """The number of steps between a batch's begin and its end."""
        return self._epochs.steps_per_execution

    @property
    def reads_all(self) -> bool:
        """True where every epoch is a pass over all data, which begins anew with it."""
        return self._epochs.steps_per_epoch is None

    def why_not_at(self, step: int) -> str | None:
        """Returns the reason for which the data is not where the epoch was left.

        None: it is, or it is unknown. (`tf.data` and generators may read the same data
        in each pass or not; only their author knows.)

        Args:
            step: The first step of the epoch that is trained.
        """
        data = self._epochs.data_adapter
        if not self.reads_all:
            if step or isinstance(data, GeneratorDataAdapter):
                return "begins anew: its first batches are trained again"
            return None
        if isinstance(data, ArrayDataAdapter):
            # With a seed, every pass has the same order.
            in_order = not data._shuffle or context.global_seed() is not None
        else:
            in_order = not getattr(data, "shuffle", False)
        if in_order or not step:
            return None
        return (
            "is shuffled in another order than before: some of it is trained twice in "
            "this epoch, and some is not (fit(shuffle=False) has one order; arrays "
            "have one after keras.utils.set_random_seed, too)"
        )

    def put_first(self, callback: keras.callbacks.Callback) -> None:
        """Moves a callback before the others, from its `on_train_begin` on."""
        # In place: the running loop over them continues after it.
        self.callbacks.remove(callback)
        self.callbacks.insert(0, callback)

    def begin_epoch_at(self, step: int, logs: Mapping[str, float]) -> None:
        """Makes the epoch that is about to begin skip its first steps.

        The remaining steps keep their numbers, and the epoch ends as any other.

        Args:
            step: The first step that is trained, a multiple of `steps_per_execution`.
                Where an epoch is a pass over all data, the batches before it are read
                and dropped; elsewhere the data continues where it is.
            logs: Those of the step before, which are the epoch's where no step is left.
        """
        epochs, whole = self._epochs, self._epochs._enumerate_iterator

        def rest() -> Iterator[tuple[int, int, Any]]:
            for begin, end, batches in whole():
                if begin >= step:
                    yield begin, end, batches
                elif self.reads_all:
                    for _ in range(begin, end + 1):
                        next(batches, None)

        def rest_once() -> Iterator[tuple[int, int, Any]]:
            del epochs._enumerate_iterator  # the next epoch is whole
            return rest()

        epochs._enumerate_iterator = rest_once
        self._begin_with_logs(dict(logs))

    def _begin_with_logs(self, before: dict[str, float]) -> None:
        model, of_epoch = self._model, self._model._get_metrics_result_or_logs

        def of_epoch_once(logs: Any) -> Any:
            del model._get_metrics_result_or_logs
            return of_epoch(before if logs == {} else logs)

        model._get_metrics_result_or_logs = of_epoch_once

    def left_early(self) -> bool:
        """Returns whether the epoch was left before its last step, as far as is known.

        `stop_training` leaves it so. After the last step that makes no difference, but
        cannot be distinguished where the number of steps is unknown.
        """
        epochs = self._epochs
        if inspect.getgeneratorstate(epochs._epoch_iterator) != inspect.GEN_SUSPENDED:
            return False
        ran_out = epochs._num_batches is not None and epochs._current_iterator is None
        return not ran_out


def start_at_epoch(model: keras.Model, epoch: int | None) -> None:
    """Makes the running `fit` of a model start at an epoch; None: at its own first.

    Relies on: `Model._initial_epoch`, which Keras's own `BackupAndRestore` sets. On an
    upgrade, watch: `fit` reads it after `on_train_begin`.
    """
    model._initial_epoch = epoch


def running_fit(
    model: keras.Model, frame: FrameType | None = None
) -> RunningFit | None:
    """Returns the `fit` of a model on the stack of this call; None without one.

    Args:
        model: The model.
        frame: The frame to start from, of another thread, for example; None: this one.
    """
    frame = frame or inspect.currentframe()
    while frame is not None:
        if frame.f_code is _FIT and frame.f_locals["self"] is model:
            names = frame.f_locals
            return RunningFit(
                model, names["callbacks"].callbacks, names["epoch_iterator"]
            )
        frame = frame.f_back
    return None
