"""Which callbacks ended a run for good, so that it is not begun again by mistake."""

from collections.abc import Sequence
from typing import Any

import keras

from gshard_tf.compat.keras_epochs import RunningFit


def ended_by(fit: RunningFit, epoch: int) -> list[dict[str, Any]]:
    """The settings of each `EarlyStopping` that stopped the training after an epoch."""
    return [
        _settings(callback)
        for callback in _early_stopping(fit)
        # It never stops after epoch 0, which stands for "not yet".
        if callback.stopped_epoch and callback.stopped_epoch == epoch
    ]


def would_end_again(fit: RunningFit, ended: Sequence[dict[str, Any]] | None) -> bool:
    """Whether `fit` was given all those that ended the run, with the same settings.

    Args:
        fit: What is to go on.
        ended: What `ended_by` returned; None or empty where nothing ended the run.
    """
    given = [_settings(callback) for callback in _early_stopping(fit)]
    return bool(ended) and all(settings in given for settings in ended)


def _early_stopping(fit: RunningFit) -> list[keras.callbacks.EarlyStopping]:
    return [c for c in fit.callbacks if isinstance(c, keras.callbacks.EarlyStopping)]


def _settings(callback: keras.callbacks.EarlyStopping) -> dict[str, Any]:
    baseline = callback.baseline
    return {
        "class": type(callback).__name__,
        "monitor": callback.monitor,
        "mode": callback.mode,
        "patience": int(callback.patience),
        # Keras turns its sign when the first epoch ends.
        "min_delta": abs(float(callback.min_delta)),
        "baseline": None if baseline is None else float(baseline),
        "start_from_epoch": int(callback.start_from_epoch),
    }
