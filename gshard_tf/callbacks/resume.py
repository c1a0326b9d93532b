"""Resuming a run: what is restored when `fit` begins, and when its epoch begins."""

import json
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import keras

from gshard_tf.callbacks.finished_runs import would_end_again
from gshard_tf.callbacks.resume_warnings import learning_rates, warn_of_restarts
from gshard_tf.checkpoints.dataset import ResumableDataset
from gshard_tf.checkpoints.manager import CheckpointManager
from gshard_tf.checkpoints.manifest import Manifest
from gshard_tf.checkpoints.restore import Restored
from gshard_tf.checkpoints.training_state import Variable
from gshard_tf.compat.keras_epochs import RunningFit, running_fit, start_at_epoch
from gshard_tf.compat.keras_seeds import give_global_seed_generator
from gshard_tf.spmd.keras_step import complete


def restore_run(
    manager: CheckpointManager,
    model: keras.Model,
    state: Callable[[], Mapping[str, Variable]],
    dataset: ResumableDataset | None,
    config: Any,
    params: Mapping[str, Any],
) -> Restored | None:
    """Restores the newest checkpoint of a run, and lets `fit` start at its epoch.

    Args:
        manager: The checkpoints of the run.
        model: The model that `fit` trains.
        state: Returns the variables of the run.
        dataset: The input to move to its position.
        config: The configuration that the run must have had.
        params: The parameters that Keras gives to callbacks.

    Returns:
        The result, or None in a new run.
    """
    if dataset is not None:
        # Metrics too: outside a strategy, Keras makes them in the first step.
        complete(model, dataset.dataset.element_spec, "train")
    compiled = learning_rates(state())
    restored = manager.restore(
        state(),
        dataset=dataset,
        accept=lambda manifest: _check_config(manager.directory, manifest, config),
    )
    if restored is None:
        if dataset is not None:
            # Keras has looked at a batch, to build the metrics.
            dataset.restart()
        return None
    manifest = restored.manifest
    if manifest.global_seed is not None:
        with model.distribute_strategy.scope():
            give_global_seed_generator(manifest.global_seed)
    start_at_epoch(model, manifest.epoch)
    fit = running_fit(model)
    if fit is not None and would_end_again(fit, manifest.ended_by):
        start_at_epoch(model, max(manifest.epoch, params["epochs"]))
        warnings.warn(
            f"The run in {manager.directory} is finished: EarlyStopping ended it at "
            f"step {manifest.step}, after {manifest.epoch} epochs. Nothing is trained, "
            "and the model is as that epoch left it. To go on, give fit another "
            "patience, or no EarlyStopping.",
            stacklevel=3,
        )
    else:
        current = learning_rates(state())
        warn_of_restarts(fit, manifest, compiled, current, dataset is not None)
    return restored


def _check_config(directory: Path, manifest: Manifest, config: Any) -> None:
    """Raises `ValueError` unless a run has the configuration of its checkpoint."""
    # As JSON would give it back.
    if manifest.config != json.loads(json.dumps(config)):
        raise ValueError(
            f"`config` must be that of the run in {directory}, config="
            f"{manifest.config!r}. Received: config={config!r}"
        )


def check_epoch_resumes(
    fit: RunningFit | None, manifest: Manifest, length: int | None, has_position: bool
) -> RunningFit:
    """Returns `fit`, unless the epoch of a checkpoint cannot be resumed in its middle.

    Args:
        fit: The call of `fit` that resumes the run; None in a custom loop.
        manifest: The manifest of the checkpoint.
        length: The number of steps in an epoch; None where it is unknown.
        has_position: Whether the position in the input was restored.

    Raises:
        ValueError: when it cannot be resumed.
    """
    done = manifest.epoch_step
    stopped = f"The run was stopped {done} steps into an epoch"
    if fit is None:
        raise ValueError(
            f"{stopped}, which only Keras's own `fit` can resume: it must be given the "
            "callback. Received: a loop that calls callbacks by itself"
        )
    endless = has_position and length is None
    over = length is not None and length <= done
    if over and length == done and manifest.awaits_end:
        over = False
    if endless or over:
        raise ValueError(
            f"{stopped}, and must be resumed with the same fit(steps_per_epoch=...). "
            f"Received: steps_per_epoch={length}"
        )
    if done % fit.steps_per_execution:
        raise ValueError(
            f"{stopped}, and must be resumed with the same "
            "compile(steps_per_execution=...), or one that divides that. Received: "
            f"steps_per_execution={fit.steps_per_execution}"
        )
    return fit
