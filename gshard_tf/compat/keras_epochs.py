"""The `fit` of Keras that is calling: its callbacks, and where it is in an epoch.

Keras tells a callback neither who else listens nor why an epoch ended, and has no way
to begin an epoch in its middle: stopping the training and starting it again leaves a
`PyDataset` within an epoch for good.
"""

import inspect
from collections.abc import Iterator, Mapping
from types import FrameType
from typing import Any

import keras

# Private API: the loop of `fit`. On an upgrade, check that its locals are still
# `self`, `callbacks` (a `CallbackList` before `on_train_begin`, which goes through its
# list by index and gives all of it the same `logs`) and `epoch_iterator`;
# that it begins each epoch by `iter(epoch_iterator)`, after `on_epoch_begin`; that
# `_enumerate_iterator` is the generator of an epoch's executions, `(first step, last
# step, batches)`, and calls the adapter's `on_epoch_end` when it is exhausted; and that
# an epoch whose data ran out leaves `_num_batches` and no `_current_iterator`; and that
# an epoch without steps makes its logs by `_get_metrics_result_or_logs({})`.
from keras.src.backend.tensorflow.trainer import TensorFlowTrainer, TFEpochIterator

# Private API: what `fit` was given. On an upgrade, check that arrays shuffled by
# TensorFlow's global seed have one order in all epochs, and that whether they and a
# `PyDataset` are shuffled is in `_shuffle` and `shuffle`.
from keras.src.trainers.data_adapters import ArrayDataAdapter, GeneratorDataAdapter

# Private API: `tf.random.set_seed` has no public counterpart that reads.
from tensorflow.python.eager import context

_FIT = inspect.unwrap(TensorFlowTrainer.fit).__code__


class RunningFit:
    """A call of `fit` that has not returned.

    Attributes:
        callbacks: All that it calls.
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
        """How many steps an epoch has; None as long as nobody knows."""
        return self._epochs.num_batches

    @property
    def steps_per_execution(self) -> int:
        """How many steps lie between a batch's begin and its end."""
        return self._epochs.steps_per_execution

    @property
    def reads_all(self) -> bool:
        """Whether every epoch is a pass over all data, which begins anew with it."""
        return self._epochs.steps_per_epoch is None

    def why_not_at(self, step: int) -> str | None:
        """Why the data is not where it was when the epoch was left.

        None: it is, or nobody knows. (What `tf.data` and generators read in a pass over
        all data, the same each time or not, only their author knows.)

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
        """Lets a callback be called before the others, from its `on_train_begin` on."""
        # In place: the loop over them that is calling goes on behind it.
        self.callbacks.remove(callback)
        self.callbacks.insert(0, callback)

    def begin_epoch_at(self, step: int, logs: Mapping[str, float]) -> None:
        """Lets the epoch that is about to begin leave out its first steps.

        The steps that are left keep their numbers, and the epoch ends as any other.

        Args:
            logs: Those of the step before, which are the epoch's where no step is left.
            step: The first step that is trained, a multiple of `steps_per_execution`.
                Where an epoch is a pass over all data, the batches before it are read
                and dropped; elsewhere the data goes on where it is.
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
        """Whether the epoch was left while it had steps to come, as far as is known.

        That is what `stop_training` does. After the last step it makes no difference,
        but is not told from it where the number of steps is unknown.
        """
        epochs = self._epochs
        if inspect.getgeneratorstate(epochs._epoch_iterator) != inspect.GEN_SUSPENDED:
            return False
        ran_out = epochs._num_batches is not None and epochs._current_iterator is None
        return not ran_out


def start_at_epoch(model: keras.Model, epoch: int | None) -> None:
    """Lets the running `fit` of a model start at an epoch; None: at its own first one.

    Relies on: `Model._initial_epoch`, which Keras's own `BackupAndRestore` sets. On an
    upgrade, watch: `fit` reads it after `on_train_begin`.
    """
    model._initial_epoch = epoch


def running_fit(
    model: keras.Model, frame: FrameType | None = None
) -> RunningFit | None:
    """The `fit` of a model that called whoever calls this; None when none did.

    Args:
        model: The model.
        frame: Where to look from, another thread's, say; None: from here.
    """
    frame = frame or inspect.currentframe()
    while frame is not None:
        if frame.f_code is _FIT and frame.f_locals["self"] is model:
            found = frame.f_locals
            return RunningFit(
                model, found["callbacks"].callbacks, found["epoch_iterator"]
            )
        frame = frame.f_back
    return None
