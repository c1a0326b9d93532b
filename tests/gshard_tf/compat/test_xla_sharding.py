"""XLA's sharding messages, and the operation that carries them."""

import numpy as np
import tensorflow as tf

from gshard_tf.compat import xla_sharding


def test_the_gradient_has_the_same_annotation():
    tiles = xla_sharding.tiled(np.arange(2))

    @tf.function
    def gradient(x):
        y = xla_sharding.constrain(x, tiles) ** 2.0
        return tf.gradients(y, x)

    graph = gradient.get_concrete_function(tf.TensorSpec([4])).graph
    annotated = [op for op in graph.get_operations() if op.type == "XlaSharding"]
    assert len(annotated) == 2
    for op in annotated:
        assert op.get_attr("sharding") == op.get_attr("_XlaSharding") == tiles


def test_devices_are_positions_in_the_mesh():
    devices = np.array([[2, 0], [1, 3]])
    assert xla_sharding.tiled(devices) != xla_sharding.tiled(devices.T)
    assert xla_sharding.partially_tiled(devices) != xla_sharding.tiled(devices)
    assert xla_sharding.replicated() == xla_sharding.replicated()
