"""Eager operations that run in the background."""

import atexit
import contextlib
import functools
from collections.abc import Iterator

# Private API: an executor of eager operations with a thread of its own. On an upgrade,
# watch: that a function called in its scope returns tensors at once, which whoever
# reads them waits for; that an error comes out of the read; and that the executor
# refuses further calls after one, until `clear_error`.
from tensorflow.python.eager import context, executor


@functools.cache
def _background() -> executor.Executor:
    made = executor.new_executor(enable_async=True)
    # What still runs needs Python.
    atexit.register(made.wait)
    return made


@contextlib.contextmanager
def in_background() -> Iterator[None]:
    """Makes eager calls of functions return before they have run, in their order."""
    # An error belongs to the tensors of its own call, and not to the next one.
    _background().clear_error()
    with context.executor_scope(_background()):
        yield
