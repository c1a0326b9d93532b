"""Partitioned steps as files that jax alone runs.

`step_program(model, "train", batch).save(path)` writes one. It, `save_state` and
`load_state` need TensorFlow and Keras, and are imported when they are first used;
everything else needs numpy and jax alone.
"""

import importlib
from typing import TYPE_CHECKING, Any

from gshard_tf.export.array_dataset import ArrayBatches, write_data
from gshard_tf.export.loader import LoadedProgram, load
from gshard_tf.export.manifest import Manifest, Tensor, Variant
from gshard_tf.export.program_file import read_manifest
from gshard_tf.export.state_file import read_state, write_state
from gshard_tf.spmd.leaf_names import batch_arrays

if TYPE_CHECKING:
    from gshard_tf.export.exporter import step_program
    from gshard_tf.export.keras_state import load_state, save_state

__all__ = [
    "ArrayBatches",
    "Manifest",
    "LoadedProgram",
    "Tensor",
    "Variant",
    "load",
    "load_state",
    "batch_arrays",
    "read_manifest",
    "read_state",
    "save_state",
    "step_program",
    "write_data",
    "write_state",
]

_NEEDS_KERAS = {
    "load_state": "keras_state",
    "save_state": "keras_state",
    "step_program": "exporter",
}


def __getattr__(name: str) -> Any:
    if name not in _NEEDS_KERAS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from gshard_tf.compat.versions import check

    check()
    module = importlib.import_module(f"{__name__}.{_NEEDS_KERAS[name]}")
    value = globals()[name] = getattr(module, name)
    return value
