"""Preemption: SIGTERM ends a `fit` that has a `CheckpointCallback`."""

from __future__ import annotations

import weakref
from types import FrameType
from typing import TYPE_CHECKING

from gshard_tf.compat.keras_epochs import running_fit
from gshard_tf.runtime.termination import Termination

if TYPE_CHECKING:
    from gshard_tf.callbacks.checkpoint import CheckpointCallback


def listen_for_sigterm(owner: CheckpointCallback, grace: float) -> Termination:
    """Returns a started `Termination` of the run that a callback saves.

    Args:
        owner: The callback.
        grace: Seconds from the signal to the end of the process.
    """
    in_fit = running_fit(owner.model) is not None
    # A custom loop that an exception ended drops this callback.
    reference = weakref.ref(owner)

    def is_running(frame: FrameType | None) -> bool:
        callback = reference()
        return callback is not None and (
            not in_fit or running_fit(callback.model, frame) is not None
        )

    def progress() -> str:
        callback = reference()
        steps = [] if callback is None else callback.manager.steps()
        return f"The newest checkpoint is of step {max(steps, default=0)}."

    termination = Termination(grace, is_running, progress)
    termination.start()
    return termination
