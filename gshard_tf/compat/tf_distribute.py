"""Extended halves of TensorFlow's strategies, and their scopes."""

import contextlib
from typing import Any

from tensorflow.python.distribute import one_device_strategy

# The extended half of OneDeviceStrategy, which feeds one global batch to one replica.
# Relies on: `_create_variable`, `_call_for_each_replica`, `_scope`, `_device` and
# `_container_strategy`. On an upgrade, watch: these, and what `fit` calls besides.
OneDeviceExtended = one_device_strategy.OneDeviceExtended


class AroundScope(contextlib.AbstractContextManager):
    """A strategy's scope; a subclass says how it ends.

    A class, not a generator: the trace of an error begins where the scope was entered.

    Args:
        scope: The scope.
    """

    def __init__(self, scope: contextlib.AbstractContextManager):
        self._scope = scope

    def __enter__(self) -> Any:
        return self._scope.__enter__()
