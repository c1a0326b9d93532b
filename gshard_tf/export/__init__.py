"""Programs that travel: a partitioned step as a file, run where TensorFlow is not.

`strategy.program(model, "train", batch).save(path)` writes one; everything here needs
numpy and jax alone.
"""

from gshard_tf.export.array_dataset import Batches
from gshard_tf.export.loader import PortableProgram, load
from gshard_tf.export.manifest import Manifest, Tensor, Variant
from gshard_tf.export.naming import named_batch
from gshard_tf.export.program_file import (
    read_manifest,
    read_state,
    write_data,
    write_state,
)

__all__ = [
    "Batches",
    "Manifest",
    "PortableProgram",
    "Tensor",
    "Variant",
    "load",
    "named_batch",
    "read_manifest",
    "read_state",
    "write_data",
    "write_state",
]
