"""Warnings of a resumed run: data, callbacks and rates that begin anew."""

import warnings
from collections.abc import Mapping
from typing import Any

import keras

from gshard_tf.checkpoints.manifest import Manifest
from gshard_tf.checkpoints.training_state import Variable
from gshard_tf.compat.keras_epochs import RunningFit

# Callbacks that set the rate themselves, so another one is no surprise.
_SET_THE_RATE = (
    keras.callbacks.LearningRateScheduler,
    keras.callbacks.ReduceLROnPlateau,
)


def warn_of_restarts(
    fit: RunningFit | None,
    manifest: Manifest,
    compiled: Mapping[str, float],
    current: Mapping[str, float],
    has_position: bool,
) -> None:
    """Warns of each part of a resumed run that is not where it was.

    Args:
        fit: The call of `fit` that resumes the run; None in a custom loop.
        manifest: The manifest of the checkpoint.
        compiled: The learning rates before it was restored; see `learning_rates`.
        current: Those after.
        has_position: Whether the position in the input was restored.
    """
    messages = [_of_the_rates(fit, compiled, current)]
    if fit is not None:
        messages.append(_of_the_callbacks(fit, manifest))
        if not has_position:
            messages.append(_of_the_data(fit, manifest))
    for message in filter(None, messages):
        warnings.warn(message, stacklevel=2)


def _of_the_data(fit: RunningFit, manifest: Manifest) -> str | None:
    """The warning of data that are not where they were, without a saved position."""
    reason = fit.why_not_at(manifest.epoch_step)
    if reason is None or not manifest.step:
        return None
    return (
        f"The run resumes at step {manifest.step}, {manifest.epoch_step} steps into "
        f"epoch {manifest.epoch + 1}, and the data that fit was given {reason}. To go "
        "on where it was, train on ResumableDataset(dataset).dataset, and give that to "
        "CheckpointCallback(dataset=...)."
    )


def _of_the_callbacks(fit: RunningFit, manifest: Manifest) -> str | None:
    """The warning of callbacks that compare epochs and do not know the earlier ones."""
    anew = sorted({type(c).__name__ for c in fit.callbacks if _compares_epochs(c)})
    if not anew or not manifest.epoch:
        return None
    return (
        f"The run resumes after epoch {manifest.epoch}, and a checkpoint does not have "
        "what callbacks know of the epochs before. Their best value and their patience "
        f"begin anew: {', '.join(anew)}"
    )


def _compares_epochs(callback: keras.callbacks.Callback) -> bool:
    if isinstance(callback, keras.callbacks.ModelCheckpoint):
        return callback.save_best_only
    return isinstance(
        callback, keras.callbacks.EarlyStopping | keras.callbacks.ReduceLROnPlateau
    )


def learning_rates(state: Mapping[str, Variable]) -> dict[str, float]:
    """Returns the learning rate of each optimizer without a schedule, by its name."""
    return {
        name: float(variable.numpy())
        for name, variable in state.items()
        if name.endswith("/learning_rate")
    }


def _of_the_rates(
    fit: RunningFit | None, compiled: Mapping[str, float], current: Mapping[str, float]
) -> str | None:
    """The warning of a checkpoint's learning rate that `compile` did not have."""
    other = {n: rate for n, rate in compiled.items() if rate != current.get(n, rate)}
    callbacks: list[Any] = [] if fit is None else fit.callbacks
    if not other or any(isinstance(c, _SET_THE_RATE) for c in callbacks):
        return None
    rates = ", ".join(f"{n} {rate:g} and {current[n]:g}" for n, rate in other.items())
    return (
        "The checkpoint has another learning rate than the model was compiled with, "
        "and is the one that is used. For another, assign "
        "model.optimizer.learning_rate in a callback behind this one. Received: "
        f"compiled and saved: {rates}"
    )
