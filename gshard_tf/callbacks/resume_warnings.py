"""What does not go on where it was when a run does, as sentences for a warning."""

from collections.abc import Mapping
from typing import Any

import keras

from gshard_tf.checkpoints.manifest import Manifest
from gshard_tf.checkpoints.naming import Variable
from gshard_tf.compat.keras_epochs import RunningFit

# They set the rate themselves, so another one is no surprise.
_SET_THE_RATE = (
    keras.callbacks.LearningRateScheduler,
    keras.callbacks.ReduceLROnPlateau,
)


def of_the_data(fit: RunningFit, found: Manifest) -> str | None:
    """Says so when data of which nobody saved the position is not at its place."""
    reason = fit.why_not_at(found.epoch_step)
    if reason is None or not found.step:
        return None
    return (
        f"The run goes on at step {found.step}, {found.epoch_step} steps into epoch "
        f"{found.epoch + 1}, and the data that fit was given {reason}. To go on where "
        "it was, train on ResumableDataset(dataset).dataset, and give that to "
        "CheckpointCallback(dataset=...)."
    )


def of_the_callbacks(fit: RunningFit, found: Manifest) -> str | None:
    """Says so when callbacks that compare epochs do not know those before."""
    anew = sorted({type(c).__name__ for c in fit.callbacks if _compares_epochs(c)})
    if not anew or not found.epoch:
        return None
    return (
        f"The run goes on after epoch {found.epoch}, and a checkpoint does not have "
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
    """The learning rate of each optimizer that has none by a schedule, by its name."""
    return {
        name: float(variable.numpy())
        for name, variable in state.items()
        if name.endswith("/learning_rate")
    }


def of_the_rates(
    fit: RunningFit | None, compiled: Mapping[str, float], now: Mapping[str, float]
) -> str | None:
    """Says so when the checkpoint's learning rate is another than that of `compile`.

    Args:
        fit: What is to go on, if it is Keras's own.
        compiled: The rates before the checkpoint was restored; see `learning_rates`.
        now: Those after.
    """
    other = {n: rate for n, rate in compiled.items() if rate != now.get(n, rate)}
    given: list[Any] = [] if fit is None else fit.callbacks
    if not other or any(isinstance(c, _SET_THE_RATE) for c in given):
        return None
    rates = ", ".join(f"{n} {rate:g} and {now[n]:g}" for n, rate in other.items())
    return (
        "The checkpoint has another learning rate than the model was compiled with, "
        "and is the one that is used. For another, assign "
        "model.optimizer.learning_rate in a callback behind this one. Received: "
        f"compiled and saved: {rates}"
    )
