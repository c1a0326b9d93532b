"""XLA's OpSharding messages, and the operation that annotates a tensor with one."""

import numpy as np
import tensorflow as tf
from tensorflow.compiler.tf2xla.python import xla as tf2xla
from tensorflow.core.framework import attr_value_pb2
from tensorflow.python.compiler.xla.experimental.xla_sharding import Sharding


def constrain(tensor: tf.Tensor, sharding: bytes) -> tf.Tensor:
    """Returns a symbolic tensor annotated with a serialized sharding.

    Relies on: `tf2xla.sharding`, whose gradient is the same annotation, and the
    attribute `_XlaSharding`, which TPUStrategy's bridge reads; the gradient's operation
    has it too. On an upgrade, watch: both.
    """
    annotated = tf2xla.sharding(tensor, sharding=sharding)
    annotated.op._set_attr("_XlaSharding", attr_value_pb2.AttrValue(s=sharding))
    annotated.set_shape(tensor.shape)
    return annotated


# Relies on: `xla_sharding.Sharding`, which builds the messages. On an upgrade, watch:
# that `tile` and `partial_tile` still count devices by their position in the mesh.


def replicated() -> bytes:
    """Every device holds the whole tensor."""
    return Sharding.replicate().proto.SerializeToString()


def tiled(devices: np.ndarray) -> bytes:
    """Slice `[i, j, ...]` is on device `devices[i, j, ...]`."""
    return Sharding.tile(devices).proto.SerializeToString()


def partially_tiled(devices: np.ndarray) -> bytes:
    """Slice `[i, j, ...]` is on each of the devices `devices[i, j, ..., :]`."""
    return Sharding.partial_tile(devices).proto.SerializeToString()
