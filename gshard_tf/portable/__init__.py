"""Programs that travel: a partitioned step as a file, run where TensorFlow is not.

`strategy.program(model, "train", batch).save(path)` writes one; everything here needs
numpy and jax alone.
"""

from gshard_tf.portable.data import Batches
from gshard_tf.portable.files import read_manifest, read_state, write_data, write_state
from gshard_tf.portable.loading import PortableProgram, load
from gshard_tf.portable.manifest import Manifest, Tensor, Variant
from gshard_tf.portable.names import named_batch

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
