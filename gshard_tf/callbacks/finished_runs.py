"""Finished runs: those that `EarlyStopping` ended are not resumed by mistake."""

from collections.abc import Sequence
from typing import Any

import keras

from gshard_tf.compat.keras_epochs import RunningFit


def ended_by(fit: RunningFit, epoch: int) -> list[dict[str, Any]]:
    """Returns the settings of each `EarlyStopping` that stopped after an epoch."""
    return [
        _settings(callback)
        for callback in _early_stopping(fit)
        # It never stops after epoch 0, which stands for "not yet".
        if callback.stopped_epoch and callback.stopped_epoch == epoch
    ]


def would_end_again(fit: RunningFit, ended: Sequence[dict[str, Any]] | None) -> bool:
    """Returns whether `fit` has all callbacks that ended the run, with their settings.

    Args:
        fit: The call of `fit` that resumes the run.
        ended: The result of `ended_by`; None or empty where no callback ended the run.
    """
    if not ended:
        return False
    current = [_settings(callback) for callback in _early_stopping(fit)]
    return all(settings in current for settings in ended)


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
