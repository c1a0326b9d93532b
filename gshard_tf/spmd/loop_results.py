"""Results of the steps of an execution, of which a loop keeps the last one's."""

import threading
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from gshard_tf.spmd.executable import StartedStep

# For so long the results of a step that is not the last one of a full execution wait,
# once they are there, for another step. Where the data ends there is none.
_LAST_STEP_SECONDS = 0.005


class LoopResults:
    """The results of the latest step of a loop.

    A loop starts steps in one thread and reads results in another. So the steps follow
    each other without waiting, and results that the loop will drop are never read.

    Args:
        steps: The number of steps of a full execution.
    """

    def __init__(self, steps: int):
        self._steps = steps
        self._changed = threading.Condition()
        self._latest: Any = None  # until the first step
        self._number = 0  # of the latest step
        self._unread = 0  # steps since results were last read

    def put(self, started: "StartedStep") -> int:
        """Takes the place of the step before; returns the number of this one."""
        with self._changed:
            self._latest = started
            self._number += 1
            self._unread += 1
            self._changed.notify_all()
            return self._number

    def read(self, number: int) -> list[np.ndarray]:
        """Returns the results of a step, or zeros when another has followed it."""
        with self._changed:
            started = self._latest
            while self._number == number and self._unread < self._steps:
                is_ready = started.is_ready()
                if not self._changed.wait(_LAST_STEP_SECONDS) and is_ready:
                    break
            if self._number != number:
                return [np.zeros(each.shape, each.dtype) for each in started.outputs]
            self._unread = 0
        return started.read()
