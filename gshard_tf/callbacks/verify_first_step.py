"""`VerifyFirstStep`: `verify`, on the first batch of a run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

import numpy as np

from gshard_tf.callbacks.keras_3 import Keras3Callback
from gshard_tf.runtime.operation_threads import has_two_threads
from gshard_tf.spmd.lowering import LoweredStep
from gshard_tf.spmd.step import Step
from gshard_tf.verification.report import VerificationReport
from gshard_tf.verification.verify import (
    check_lowered,
    check_tolerance,
    strategy_of,
)

if TYPE_CHECKING:
    from gshard_tf.spmd.strategy import SpmdExtended


class VerifyFirstStep(Keras3Callback):
    """Compares the first training step of `fit` with the same step on one device.

    ```python
    model.fit(data, callbacks=[gshard_tf.VerifyFirstStep()])
    ```

    The comparison is `gshard_tf.verify`'s, with the batch that `fit` is about to train
    on, before the step is run. When they differ, `fit` ends with an error that has the
    report, and nothing of the model has changed. When they are equal, training
    continues as without this callback.

    Args:
        tolerance: See `gshard_tf.verify`. Defaults to None.

    Attributes:
        report: The `VerificationReport` of the latest run, or None before its first
            step.

    Raises:
        ValueError: for a negative tolerance; and when training begins, for a model that
            is not of an `SpmdStrategy`, or is trained by several processes.
        RuntimeError: when training begins and TensorFlow has one thread for operations,
            as on one processor.
        tf.errors.InvalidArgumentError: at the first step, when it differs; the
            `VerificationError` itself is `strategy.last_error`.
    """

    def __init__(self, tolerance: float | None = None):
        super().__init__()
        check_tolerance(tolerance)
        self.tolerance = tolerance
        self.report: VerificationReport | None = None

    def on_train_begin(self, logs: dict | None = None) -> None:
        if not has_two_threads():
            # The step that waits has one, and the step on one device needs another.
            raise RuntimeError(
                "`VerifyFirstStep` must have two threads of TensorFlow for operations. "
                "Received: one. Set `TF_NUM_INTEROP_THREADS=2` in the environment "
                "before TensorFlow starts, or call `gshard_tf.verify` before `fit`."
            )
        self.report = None
        self._extended = cast("SpmdExtended", strategy_of(self.model).extended)

    def on_train_batch_begin(self, batch: int, logs: dict | None = None) -> None:
        # Not sooner: other callbacks may run steps of their own when training begins.
        if self.report is None:
            self._extended.before_step = self._check

    def on_train_batch_end(self, batch: int, logs: dict | None = None) -> None:
        self._extended.before_step = None

    def on_train_end(self, logs: dict | None = None) -> None:
        self._extended.before_step = None

    def _check(
        self, step: Step, lowered: LoweredStep, arrays: Sequence[np.ndarray]
    ) -> None:
        self.report = check_lowered(
            self.model,
            "train",
            step.extended,
            lowered,
            lambda jit_compile: step.trace_alone(arrays, jit_compile),
            arrays,
            self.tolerance,
        )
        self.report.check()
