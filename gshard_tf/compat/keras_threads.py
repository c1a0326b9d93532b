"""Keras's settings, which belong to one thread, lent to another.

TensorFlow runs a graph's Python functions in threads of its own. A step that is
traced there (for a shape that was not known before) must see what the thread that
called `fit` sees: the dtype policy, the global seed generator, name scopes.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

# Private API: Keras has no public way to copy a thread's state. On an upgrade, check
# that these two are still `threading.local`s.
from keras.src.backend.common import global_state


def _trackers() -> tuple[Any, Any]:
    # Looked up each time: `keras.utils.clear_session` makes new ones.
    return global_state.GLOBAL_STATE_TRACKER, global_state.GLOBAL_SETTINGS_TRACKER


def keras_state() -> list[dict[str, Any]]:
    """Returns what Keras keeps for this thread."""
    return [dict(tracker.__dict__) for tracker in _trackers()]


@contextlib.contextmanager
def use_keras_state(state: list[dict[str, Any]]) -> Iterator[None]:
    """Context in which this thread has the state of the thread that `state` is from."""
    before = keras_state()
    _replace(state)
    try:
        yield
    finally:
        _replace(before)


def _replace(state: list[dict[str, Any]]) -> None:
    for tracker, attributes in zip(_trackers(), state, strict=True):
        tracker.__dict__.clear()
        tracker.__dict__.update(attributes)
