"""`NonFiniteGuard`: skips steps that make NaN or infinity, and names the layer."""

import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import keras
import numpy as np

from gshard_tf.callbacks.keras_3 import Keras3Callback
from gshard_tf.compat.keras_epochs import running_fit
from gshard_tf.compat.keras_layers import all_sublayers
from gshard_tf.spmd.nonfinite import NonFiniteError, SkippedStep, is_finite

if TYPE_CHECKING:
    from gshard_tf.callbacks.checkpoint import CheckpointCallback

ACTIONS = ("raise", "skip", "roll_back")


class NonFiniteGuard(Keras3Callback):
    """Keeps NaN and infinity out of a model that is trained on a mesh.

    A training step that would make any weight, slot or metric not finite changes
    nothing: no weight, counter or seed. The same batch then shows which layer made the
    number, and `action` decides how the run continues. The test is part of the step's
    program; it reads the new state, and needs memory for a second copy of it while the
    step runs. Only steps of a `fit` that has this callback are guarded.

    Keras calls it before all other callbacks, wherever it stands among them. In an
    epoch of which every step was skipped so far, their metrics are NaN, where Keras
    reports 0 for the mean of no values.

    Args:
        action: `"raise"`: raises `NonFiniteError`. `"skip"`: continues with the
            next batch, as loss scaling does. `"roll_back"`: restores the newest
            checkpoint and continues with the next batch, so that the run reaches the
            same step by another way (PaLM, arXiv 2204.02311, section 5.1).
        checkpoint: The run's `CheckpointCallback`, for rolling back.
        max_consecutive: The number of steps in a row that may be skipped, and of
            roll-backs to one checkpoint, before it raises in any case.

    Attributes:
        skipped: One message per skipped step.

    Raises:
        ValueError: for an unknown action, or no checkpoint to roll back to.
    """

    def __init__(
        self,
        action: str = "raise",
        checkpoint: "CheckpointCallback | None" = None,
        max_consecutive: int = 5,
    ):
        super().__init__()
        if action not in ACTIONS:
            raise ValueError(
                f"`action` must be one of {ACTIONS}. Received: action={action!r}"
            )
        if (action == "roll_back") != (checkpoint is not None):
            raise ValueError(
                "`checkpoint` must be given if and only if action='roll_back'. "
                f"Received: action={action!r}, checkpoint={checkpoint!r}"
            )
        self.action = action
        self.checkpoint = checkpoint
        self.max_consecutive = max_consecutive
        self.skipped: list[str] = []
        self._consecutive = 0
        self._rolled_back_to: list[int] = []
        self._just_skipped: list[SkippedStep] = []
        # The steps of the latest batch, the first batch of the epoch, whether its
        # metrics have any values, and the names of those that have none.
        self._steps_run = 0
        self._first_batch: int | None = None
        self._has_trained = False
        self._empty_metrics: list[str] = []

    def on_train_begin(self, logs: dict | None = None) -> None:
        self._extended = self.model.distribute_strategy.extended
        if not hasattr(self._extended, "skipped_steps"):
            raise ValueError(
                "A model with a NonFiniteGuard must be one of an SpmdStrategy; "
                "elsewhere use keras.callbacks.TerminateOnNaN. Received: a model of "
                f"{type(self.model.distribute_strategy).__name__}"
            )
        fit = running_fit(self.model)
        if fit is None:
            raise ValueError(
                "A NonFiniteGuard must be a callback of Keras's own `fit`. Received: a "
                "loop that calls callbacks by itself"
            )
        # The others must not judge or save a step that was skipped.
        fit.put_first(self)
        self._just_skipped.clear()

    def on_epoch_begin(self, epoch: int, logs: dict | None = None) -> None:
        self._first_batch = None
        self._has_trained = False
        self._empty_metrics = []

    def on_train_batch_begin(self, batch: int, logs: dict | None = None) -> None:
        if self._first_batch is None:
            self._first_batch = batch
        run = self.model.train_function
        if isinstance(run, _Guarded):
            # That of a batch which never ran: a callback raised before.
            run = run.run
        self.model.train_function = _Guarded(self, run)

    def run_guarded(self, run: Callable, iterator: Any) -> Any:
        """Runs a train function with the guard on, and then turns it off."""
        self._extended.keep_finite = True
        before = self._extended.steps_run.total()
        try:
            logs = run(iterator)
            self._steps_run = self._extended.steps_run.total() - before
            self._just_skipped = self._extended.skipped_steps[:]
            return logs
        finally:
            self._extended.keep_finite = False
            self._extended.skipped_steps.clear()

    def on_train_batch_end(self, batch: int, logs: dict | None = None) -> None:
        skipped, self._just_skipped = self._just_skipped, []
        self._has_trained |= self._steps_run > len(skipped) or self._was_resumed()
        self._empty_metrics = [] if self._has_trained else [*(logs or {})]
        self._mark_empty_metrics(logs)
        if not skipped:
            self._consecutive = 0
            return
        self._consecutive += len(skipped)
        message = (
            f"Step {skipped[0].number} would have made NaN or infinity: "
            f"{_blame_or_reason(self.model, skipped[0])}"
        )
        self.skipped.append(message)
        if self.action == "raise":
            raise NonFiniteError(f"{message}. The model is as it was before.")
        if self._consecutive > self.max_consecutive:
            raise NonFiniteError(
                f"{message}. That makes {self._consecutive} such steps in a row; the "
                "model is as it was before them."
            )
        if self.checkpoint is None:  # "skip"
            warnings.warn(f"{message}. The step was left out.", stacklevel=2)
            return
        step = self.checkpoint.roll_back()
        self._rolled_back_to.append(step)
        if self._rolled_back_to.count(step) > self.max_consecutive:
            raise NonFiniteError(
                f"{message}. The run was rolled back to step {step} more than "
                f"{self.max_consecutive} times."
            )
        warnings.warn(f"{message}. Rolled back to step {step}.", stacklevel=2)

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        self._mark_empty_metrics(logs)

    def on_train_end(self, logs: dict | None = None) -> None:
        self._mark_empty_metrics(logs)

    def _was_resumed(self) -> bool:
        """Returns whether the metrics have the values of an epoch that was resumed."""
        return bool(self._first_batch) and any(
            np.any(v.numpy()) for v in self.model.metrics_variables
        )

    def _mark_empty_metrics(self, logs: dict | None) -> None:
        # Keras gives all callbacks the same dict.
        if logs:
            logs.update(dict.fromkeys(self._empty_metrics, float("nan")))


class _Guarded:
    """The train function of a model for one batch, run with the guard on.

    Also after an error, the guard is on for no other step: the model has its own
    function back when this one is called, by this `fit` or another.
    """

    def __init__(self, guard: NonFiniteGuard, run: Callable):
        self.guard = guard
        self.run = run

    def __call__(self, iterator: Any) -> Any:
        model = self.guard.model
        model.train_function = self.run
        fit = running_fit(model)
        if fit is None or not any(c is self.guard for c in fit.callbacks):
            return self.run(iterator)
        return self.guard.run_guarded(self.run, iterator)


def _blame_or_reason(model: keras.Model, skipped: SkippedStep) -> str:
    try:
        return blame(model, skipped)
    except Exception as error:
        # The host checks more than the step does: a label out of range, for example.
        # To raise it would end a run whose action is to skip.
        text = getattr(error, "message", None) or str(error)
        return (
            "sent through the model operation by operation, the batch raises "
            f"{type(error).__name__}: {text[:300]}"
        )


def blame(model: keras.Model, skipped: SkippedStep) -> str:
    """Returns the layer that made the first number which is not finite, for a message.

    The batch is sent through the model once more, operation by operation, with the
    seeds that the step had.

    Args:
        model: The model, as it was before the step.
        skipped: The step.

    Returns:
        A part of a sentence.

    Raises:
        Exception: an error that an operation raises on the host and not in the step's
            program, for a label or an index out of range, for example.
    """
    (args, _) = skipped.call_arguments()
    x, y, weights = keras.utils.unpack_x_y_sample_weight(args[0])
    if not is_finite(skipped.arrays):
        return "there is NaN or infinity in the batch itself"
    before = [(v, v.numpy()) for v in model.non_trainable_variables]
    watch = _Watch(model)
    try:
        with watch, model.distribute_strategy.scope():
            y_pred = model(x, training=True)
            culprit = watch.first_not_finite
            if culprit is None:
                loss = model.compute_loss(x, y, y_pred, weights, training=True)
                if not is_finite(loss):
                    return f"the loss of finite outputs is {float(loss)}"
    finally:
        for variable, value in before:
            variable.assign(value)
    if culprit is not None:
        return f"the output of layer {culprit.path!r} ({type(culprit).__name__})"
    return _by_gradient(model, skipped, watch.order)


def _by_gradient(
    model: keras.Model, skipped: SkippedStep, order: list[keras.layers.Layer]
) -> str:
    # Gradients flow from the last layer to the first: of all broken weights, the cause
    # is the one next to the output.
    broken = {id(v) for v in skipped.broken}
    for layer in reversed(order):
        for weight in layer.trainable_variables:
            if id(weight.value) in broken:
                return (
                    f"the gradient or the slots of {weight.path!r}; outputs and loss "
                    "are finite"
                )
    names = ", ".join(v.path for v in skipped.broken[:3])
    return f"the new values of {names}"


class _Watch:
    """Records each layer that was called, and the first whose output is not finite."""

    def __init__(self, model: keras.Model):
        self.layers = all_sublayers(model)
        self.order: list[keras.layers.Layer] = []
        self.first_not_finite: keras.layers.Layer | None = None

    def __enter__(self) -> "_Watch":
        for layer in self.layers:
            # `Layer.__call__` calls it. On this object alone, while the batch passes.
            object.__setattr__(layer, "call", self._recording(layer, layer.call))
        return self

    def __exit__(self, *_: Any) -> None:
        for layer in self.layers:
            object.__delattr__(layer, "call")

    def _recording(self, layer: keras.layers.Layer, call: Any) -> Any:
        def recording(*args: Any, **kwargs: Any) -> Any:
            outputs = call(*args, **kwargs)
            self.order.append(layer)
            if self.first_not_finite is None and not is_finite(outputs):
                self.first_not_finite = layer
            return outputs

        return recording
