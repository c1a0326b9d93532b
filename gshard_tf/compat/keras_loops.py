"""Keras's loop of several steps in one execution (`steps_per_execution`)."""

import inspect

# Relies on: the functions that `_make_function` nests, `multi_step_on_iterator`, whose
# `self` is the model, and in its loop `has_next`, which calls a step. On an upgrade,
# watch: that the loop still carries nothing but the latest step's results, and drops
# those of the steps before.
from keras.src.backend.tensorflow import trainer


def steps_of_loop() -> int:
    """Returns how many steps the loop has in which a step is being traced.

    1 where there is none: Keras then uses the results of every step.
    """
    frame = inspect.currentframe()
    in_loop = False
    while frame is not None:
        code = frame.f_code
        if code.co_filename == trainer.__file__:
            in_loop = in_loop or code.co_name == "has_next"
            if code.co_name == "multi_step_on_iterator":
                return frame.f_locals["self"].steps_per_execution if in_loop else 1
        frame = frame.f_back
    return 1
