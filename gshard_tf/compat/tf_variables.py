"""TensorFlow's resource variables, to be extended or imitated."""

from typing import Any

from tensorflow.python.eager import tape
from tensorflow.python.ops import resource_variable_ops

# The class of `tf.Variable`'s instances.
# Relies on: all of its methods reach the resource through the property `handle`, and
# C++ through `_handle`; reads pass through `_read_variable_op`, or through `_handle`;
# its constructor, unlike `tf.Variable`, calls no strategy.
# On an upgrade, watch: both, and `_restore_from_tensors`, by which checkpoints assign.
ResourceVariable = resource_variable_ops.ResourceVariable


class OwnContainer:
    """Mixin for a variable that optimizers identify without taking its handle.

    Relies on: `_distributed_container`, for which Keras's and Keras 2's `_var_key`
    look, before they look for a handle. On an upgrade, watch: that they still do.
    """

    def _distributed_container(self) -> Any:
        return self


class ResourceVariableLike:
    """Mixin for a `tf.Variable` without a resource, which tapes and optimizers accept.

    Relies on: `_should_act_as_resource_variable`, `_unique_id` and `_shared_name`, for
    which they look. On an upgrade, watch: that tapes still watch its `handle`.
    """

    _name: str
    _should_act_as_resource_variable = True

    @property
    def _unique_id(self) -> str:
        return f"{self._name}-{id(self)}"

    @property
    def _shared_name(self) -> str:
        return self._name


def notify_tapes(variable: ResourceVariableLike) -> None:
    """Notifies gradient tapes that a variable is being read.

    Relies on: `tape.variable_accessed`, whose public form is in the resource variable
    itself. On an upgrade, watch: that it still watches the attribute `handle`.
    """
    tape.variable_accessed(variable)
