"""Shards that come to the devices of a mesh."""

import numpy as np
import parity
import pytest
import tensorflow as tf

from gshard_tf.runtime.device_arrays import assemble, named_sharding
from gshard_tf.sharding.mesh_layout import MeshLayout
from gshard_tf.sharding.regions import aligned_copies


@pytest.mark.parametrize("kind", ["numpy", "aligned", "tensorflow"])
def test_a_step_may_write_to_what_is_assembled(kind):
    """jax takes aligned memory as it is. It is not donated then, and stays."""
    strategy = parity.strategy_of(4)
    sharding = named_sharding(
        MeshLayout(("expert", None), strategy.mesh),
        strategy.extended.placement.jax_mesh,
    )
    parts = [np.full([2, 64], i, np.float32) for i in range(4)]
    if kind == "aligned":
        parts = aligned_copies(parts)
    if kind == "tensorflow":
        parts = [np.asarray(tf.constant(part)) for part in parts]
    value = assemble((8, 64), sharding, lambda region: parts[region[0][0] // 2])
    for part, shard in zip(parts, value.addressable_shards, strict=True):
        assert shard.data.unsafe_buffer_pointer() != part.ctypes.data
        np.testing.assert_array_equal(shard.data, part)
