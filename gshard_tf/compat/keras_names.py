"""Keras's counters of names, by which the second `Dense` is called `dense_1`."""

import collections
import contextlib
from collections.abc import Iterator

# Private API: `keras.backend.get_uid` counts in the state of the thread, and only
# `clear_session`, which drops everything else too, begins anew. On an upgrade, check
# that it still keeps its counters under this name.
from keras.src.backend.common import global_state

_COUNTERS = "object_name_uids"


@contextlib.contextmanager
def own_names() -> Iterator[None]:
    """Context in which Keras names layers as if none had been made before."""
    before = global_state.get_global_attribute(_COUNTERS)
    global_state.set_global_attribute(_COUNTERS, collections.defaultdict(int))
    try:
        yield
    finally:
        global_state.set_global_attribute(_COUNTERS, before)
