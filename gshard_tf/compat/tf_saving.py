"""TensorFlow's checkpoints and SavedModels, as they see a variable that is sharded."""

import functools
from collections.abc import Mapping
from typing import Any

import tensorflow as tf
from tensorflow.python.ops import resource_variable_ops
from tensorflow.python.saved_model import save_context
from tensorflow.python.trackable import base as trackable
from tensorflow.python.training.saving import saveable_object_util


def in_save_context() -> bool:
    """Returns whether a SavedModel is being written.

    Relies on: `save_context.in_save_context`. On an upgrade, watch: that TensorFlow's
    own distributed variables still call it.
    """
    return save_context.in_save_context()


def uninitialized_variable(
    shape: tf.TensorShape, dtype: tf.DType, name: str
) -> tf.Variable:
    """Creates a variable that has a shape and no value.

    Relies on: `UninitializedVariable`, as TensorFlow's own export creates it. On an
    upgrade, watch: its arguments.
    """
    return resource_variable_ops.UninitializedVariable(
        shape=shape, dtype=dtype, name=name, trainable=False
    )


def add_to_saved_model(variable: tf.Variable, **arguments: Any) -> list[Any]:
    """Adds a variable to the graph of a SavedModel, and returns its resources.

    Relies on: `Trackable._export_to_saved_model_graph`, which variables override. On an
    upgrade, compare with that of `TPUReplicatedVariable`; watch: its arguments, which
    are passed on.
    """
    return variable._export_to_saved_model_graph(**arguments)


def value_to_save(variable: tf.Variable) -> Any:
    """Returns what a checkpoint saves of a variable: its value, or how to read it.

    Relies on: `Trackable._serialize_to_tensors`. On an upgrade, watch: that the value
    of a variable has the key `VARIABLE_VALUE_KEY`.
    """
    return variable._serialize_to_tensors()[trackable.VARIABLE_VALUE_KEY]


def serialized_slices(slices: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what `_serialize_to_tensors` of a sharded variable returns.

    Relies on: the saver, which takes a mapping from slice specs to tensors for a value.
    On an upgrade, watch: `saveable_object_util.saveable_objects_for_op`.

    Args:
        slices: The shards by their slice specs, such as `"8 32 0,1:0,32"`; `""` is the
            spec of a whole.
    """
    return {trackable.VARIABLE_VALUE_KEY: slices}


def restored_slices(restored_tensors: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns the shards, by slice spec, that `_restore_from_tensors` was given.

    A value that is not in slices has the spec `""`.

    Relies on: `VARIABLE_VALUE_KEY` and `patch_trackable_restore`. On an upgrade, watch:
    both.
    """
    value = restored_tensors[trackable.VARIABLE_VALUE_KEY]
    return value if isinstance(value, dict) else {"": value}


@functools.cache
def patch_trackable_restore() -> None:
    """Patches `TrackableSaveable.restore` so that sharded variables get every slice.

    TensorFlow saves a value in slices and reads it in slices, but passes only the first
    of them to the variable. Applied once, for the process; variables whose `is_sharded`
    is not true are restored as before.

    Relies on: `saveable_object_util.TrackableSaveable`, its `specs` (with `slice_spec`)
    and its `_trackable`. On an upgrade, watch: whether `restore` passes on all tensors
    of a name; then this function can go.
    """
    original = saveable_object_util.TrackableSaveable.restore

    def restore(self: Any, restored_tensors: Any, restored_shapes: Any) -> Any:
        variable = self._trackable
        if not getattr(getattr(variable, "value", None), "is_sharded", False):
            return original(self, restored_tensors, restored_shapes)
        slices = {
            spec.slice_spec: tensor
            for spec, tensor in zip(self.specs, restored_tensors, strict=True)
        }
        return variable._restore_from_tensors({trackable.VARIABLE_VALUE_KEY: slices})

    saveable_object_util.TrackableSaveable.restore = restore
