"""Reads all of a checkpoint, for its checksums."""

from pathlib import Path

import tensorflow as tf

from gshard_tf.checkpoints import tensor_bundle
from gshard_tf.checkpoints.manifest import Manifest
from gshard_tf.sharding.regions import whole


def verify(folder: Path, manifest: Manifest) -> None:
    """Reads every array and position of a checkpoint.

    Raises:
        CorruptCheckpointError: when a checksum differs.
    """
    for name, array in manifest.arrays.items():
        dtype = tf.as_dtype(array.dtype)
        tensor_bundle.read(
            folder / "state", name, array.shape, whole(array.shape), dtype
        )
    if manifest.data["position"] == "iterator":
        for process in range(manifest.processes):
            name = tensor_bundle.position_name(process)
            tensor_bundle.read(folder / "state", name, (), (), tf.variant)
