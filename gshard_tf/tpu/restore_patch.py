"""Restoring the parts of a variable from a TensorFlow checkpoint."""

import functools
from typing import Any

# Private API, changed in place: TensorFlow saves a value in slices and reads it in
# slices, but hands only the first of them to the variable. On an upgrade, see whether
# `TrackableSaveable.restore` passes on all tensors of a name; then this file can go.
from tensorflow.python.trackable import base as trackable
from tensorflow.python.training.saving import saveable_object_util


@functools.cache
def pass_on_all_slices() -> None:
    """Lets variables that lie in parts get all their parts back. Done once."""
    original = saveable_object_util.TrackableSaveable.restore

    def restore(self: Any, restored_tensors: Any, restored_shapes: Any) -> Any:
        saved = self._trackable
        if not getattr(getattr(saved, "value", None), "lies_in_parts", False):
            return original(self, restored_tensors, restored_shapes)
        parts = {
            spec.slice_spec: tensor
            for spec, tensor in zip(self.specs, restored_tensors, strict=True)
        }
        return saved._restore_from_tensors({trackable.VARIABLE_VALUE_KEY: parts})

    saveable_object_util.TrackableSaveable.restore = restore
