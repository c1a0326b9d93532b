"""What to do when a step makes NaN or infinity, and which layer did it."""

import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import keras
import numpy as np
import tensorflow as tf

from gshard_tf.compat.keras_epochs import running_fit
from gshard_tf.spmd.step import NonFiniteError, SkippedStep

if TYPE_CHECKING:
    from gshard_tf.callbacks.checkpoint import CheckpointCallback

ACTIONS = ("raise", "skip", "roll_back")


class NonFiniteGuard(keras.callbacks.Callback):
    """Keeps NaN and infinity out of a model that is trained on a mesh.

    A training step that would make any weight, slot or metric not finite changes
    nothing: no weight, counter or seed. Which layer did it is then looked for with the
    same batch, and `action` says how to go on. The test is part of the step's program;
    it costs a look at the new state and room for a second copy of it while the step
    runs. Only steps of a `fit` that has this callback are guarded.

    It is called before all other callbacks, wherever it stands among them. What they
    see of an epoch whose every step was skipped so far is NaN: the metrics of nothing,
    which Keras says are 0.

    Args:
        action: `"raise"`: raises `NonFiniteError`. `"skip"`: goes on with the next
            batch, as loss scaling does. `"roll_back"`: restores the newest checkpoint
            and goes on with the next batch, so that the run comes to the same place by
            another way (PaLM, arXiv 2204.02311, section 5.1).
        checkpoint: The run's `CheckpointCallback`, for rolling back.
        max_consecutive: How many steps may be skipped in a row, or roll-backs be made
            between two checkpoints, before it raises all the same.

    Attributes:
        skipped: One message per skipped step.

    Raises:
        ValueError: for an unknown action, or nothing to roll back to.
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
        self._in_a_row = 0
        self._rolled_back_at: list[int] = []
        self._just_skipped: list[SkippedStep] = []
        # Of the latest batch, and of the epoch: whether the metrics have seen anything.
        self._steps_run = 0
        self._first_batch: int | None = None
        self._has_trained = False
        self._of_nothing: list[str] = []

    def on_train_begin(self, logs: dict | None = None) -> None:
        self._extended = self.model.distribute_strategy.extended
        if not hasattr(self._extended, "skipped_steps"):
            raise ValueError(
                "NonFiniteGuard guards models of an SpmdStrategy; elsewhere there is "
                "keras.callbacks.TerminateOnNaN. Received: a model of "
                f"{type(self.model.distribute_strategy).__name__}"
            )
        fit = running_fit(self.model)
        if fit is None:
            raise ValueError(
                "NonFiniteGuard guards the steps of Keras's own `fit`. Received: a "
                "loop that calls callbacks by itself"
            )
        # A step that was skipped is nothing for others to judge, or to save.
        fit.put_first(self)
        self._just_skipped.clear()

    def on_epoch_begin(self, epoch: int, logs: dict | None = None) -> None:
        self._first_batch = None
        self._has_trained = False
        self._of_nothing = []

    def on_train_batch_begin(self, batch: int, logs: dict | None = None) -> None:
        if self._first_batch is None:
            self._first_batch = batch
        run = self.model.train_function
        if isinstance(run, _Guarded):
            # Of a batch that never ran: a callback raised before.
            run = run.run
        self.model.train_function = _Guarded(self, run)

    def run_guarded(self, run: Callable, iterator: Any) -> Any:
        """Runs a train function with the guard on, whatever becomes of it."""
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
        self._has_trained |= self._steps_run > len(skipped) or self._has_gone_on()
        self._of_nothing = [] if self._has_trained else [*(logs or {})]
        self._say_of_nothing(logs)
        if not skipped:
            self._in_a_row = 0
            return
        self._in_a_row += len(skipped)
        message = (
            f"Step {skipped[0].number} would have made NaN or infinity: "
            f"{_blame_or_say_why_not(self.model, skipped[0])}"
        )
        self.skipped.append(message)
        if self.action == "raise":
            raise NonFiniteError(f"{message}. The model is as it was before.")
        if self._in_a_row > self.max_consecutive:
            raise NonFiniteError(
                f"{message}. That makes {self._in_a_row} such steps in a row; the "
                "model is as it was before them."
            )
        if self.action == "skip":
            warnings.warn(f"{message}. The step was left out.", stacklevel=2)
            return
        restored = self.checkpoint.roll_back()
        self._rolled_back_at.append(restored)
        if self._rolled_back_at.count(restored) > self.max_consecutive:
            raise NonFiniteError(
                f"{message}. The run was rolled back to step {restored} more than "
                f"{self.max_consecutive} times."
            )
        warnings.warn(f"{message}. Rolled back to step {restored}.", stacklevel=2)

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        self._say_of_nothing(logs)

    def on_train_end(self, logs: dict | None = None) -> None:
        self._say_of_nothing(logs)

    def _has_gone_on(self) -> bool:
        """Whether the metrics are of an epoch that was left in its middle before."""
        return bool(self._first_batch) and any(
            np.any(v.numpy()) for v in self.model.metrics_variables
        )

    def _say_of_nothing(self, logs: dict | None) -> None:
        # Keras gives all callbacks the same dict.
        if logs:
            logs.update(dict.fromkeys(self._of_nothing, float("nan")))


class _Guarded:
    """The train function of a model for one batch, run with the guard on.

    Whoever raises, the guard is on for no other step: the model has its own function
    back when this one is called, by whichever `fit`.
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


def _blame_or_say_why_not(model: keras.Model, skipped: SkippedStep) -> str:
    try:
        return blame(model, skipped)
    except Exception as error:
        # Whatever the step does not check and the host does: a label out of range. To
        # raise it would end a run that was told to skip.
        said = getattr(error, "message", None) or str(error)
        return (
            "sent through the model operation by operation, the batch raises "
            f"{type(error).__name__}: {said[:300]}"
        )


def blame(model: keras.Model, skipped: SkippedStep) -> str:
    """Says which layer made the first number that is not finite.

    The batch is sent through the model once more, operation by operation, with the
    seeds that the step had.

    Args:
        model: The model, as it was before the step.
        skipped: The step.

    Returns:
        A part of a sentence.

    Raises:
        Exception: what an operation raises on the host that the step's program does
            not, for a label or an index out of range, say.
    """
    (args, _) = skipped.call_arguments()
    x, y, weights = keras.utils.unpack_x_y_sample_weight(args[0])
    if not all(np.all(np.isfinite(a)) for a in skipped.arrays if a.dtype.kind == "f"):
        return "there is NaN or infinity in the batch itself"
    before = [(v, v.numpy()) for v in model.non_trainable_variables]
    watch = _Watch(model)
    try:
        with watch, model.distribute_strategy.scope():
            y_pred = model(x, training=True)
            culprit = watch.first_not_finite
            if culprit is None:
                loss = model.compute_loss(x, y, y_pred, weights, training=True)
                if not _is_finite(loss):
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
    # Gradients flow from the last layer to the first: what broke lies behind all that
    # is broken, next to the output.
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
    """Notes each layer that was called, and the first whose output is not finite."""

    def __init__(self, model: keras.Model):
        # Private API: all layers, also those within layers. On an upgrade, check that
        # `_flatten_layers` exists and that `Layer.__call__` calls `self.call`.
        self.layers = list(model._flatten_layers(include_self=False))
        self.order: list[keras.layers.Layer] = []
        self.first_not_finite: keras.layers.Layer | None = None

    def __enter__(self) -> "_Watch":
        for layer in self.layers:
            # Of this object alone, and only while the batch passes.
            object.__setattr__(layer, "call", self._noting(layer, layer.call))
        return self

    def __exit__(self, *_: Any) -> None:
        for layer in self.layers:
            object.__delattr__(layer, "call")

    def _noting(self, layer: keras.layers.Layer, call: Any) -> Any:
        def noting(*args: Any, **kwargs: Any) -> Any:
            outputs = call(*args, **kwargs)
            self.order.append(layer)
            if self.first_not_finite is None and not _is_finite(outputs):
                self.first_not_finite = layer
            return outputs

        return noting


def _is_finite(values: Any) -> bool:
    return all(
        bool(tf.reduce_all(tf.math.is_finite(value)))
        for value in tf.nest.flatten(values)
        if tf.is_tensor(value) and value.dtype.is_floating
    )
