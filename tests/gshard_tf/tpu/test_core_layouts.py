"""Layouts that TensorFlow's bridge cannot store are split further, or whole."""

import numpy as np
import pytest
import tensorflow as tf

import gshard_tf
from gshard_tf.sharding.initial_value import InitialValue
from gshard_tf.sharding.regions import region_of
from gshard_tf.sharding.sharded_variable import MeshVariableBase
from gshard_tf.tpu.core_layouts import CoreLayouts
from gshard_tf.tpu.core_shards import Storage


class Weight(MeshVariableBase):
    """A variable as layouts see it."""

    dtype = tf.float32

    def __init__(self, *shape, reference=None):
        self.name = "slot" if reference else "weight"
        self.shape = tf.TensorShape(shape)
        self.reference = reference
        self.reference_dims = reference and tuple(range(len(shape)))


def decided(axes, *shape):
    mesh = gshard_tf.create_mesh({"data": 4, "model": 2}, "TPU")
    rules = gshard_tf.AxisRules(
        {"mlp": "model", "batch": "data"}, paths=[("weight", axes)]
    )
    layouts = CoreLayouts(mesh, rules)
    weight = Weight(*shape)
    slot = Weight(*shape, reference=weight)
    return layouts.layout_for(weight), layouts.layout_for(slot)


def specs(layout):
    return list(layout.spec)


def test_the_axis_left_over_splits_the_largest_dimension_that_divides():
    weight_decision, slot = decided((None, "mlp", None), 4, 8, 12)
    assert specs(weight_decision.storage) == [None, "model", "data"]
    assert specs(weight_decision.compute) == [None, "model", None]
    # A slot is used as it is stored.
    assert specs(slot.storage) == [None, "model", "data"]
    assert slot.compute is None


@pytest.mark.parametrize(("axes", "shape"), [(("mlp",), (8,)), (("mlp", None), (8, 3))])
def test_whole_where_nothing_divides(axes, shape):
    weight_decision, slot = decided(axes, *shape)
    assert not any(weight_decision.storage.spec)
    assert specs(weight_decision.compute) == ["model", None][: len(shape)]
    assert "whole" in weight_decision.reason
    assert not any(slot.storage.spec)


@pytest.mark.parametrize(
    ("axes", "expected"),
    [(("batch", "mlp"), ["data", "model"]), ((None, None), [None, None])],
)
def test_what_has_no_copies_or_no_parts_stays(axes, expected):
    weight_decision, _ = decided(axes, 8, 8)
    assert specs(weight_decision.storage) == expected
    assert weight_decision.compute is None


def test_joined_axes_are_stored_as_jax_has_them():
    import jax
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    mesh = gshard_tf.create_mesh({"data": 4, "model": 2}, "TPU")
    rules = gshard_tf.AxisRules(
        {"mlp": ("model", "data")}, paths=[("weight", (None, "mlp"))]
    )
    weight = Weight(3, 16)
    initial = InitialValue(tf.zeros([3, 16]))
    storage = Storage(np.array([]), CoreLayouts(mesh, rules), initial, "weight", True)
    storage.set_owner(weight)
    grid = Mesh(np.array(jax.devices("cpu")[:8]).reshape(4, 2), ("data", "model"))
    spec = PartitionSpec(None, ("model", "data"))
    indices = NamedSharding(grid, spec).devices_indices_map((3, 16))
    for device, coordinates in zip(
        grid.devices.flat, storage.shard_coordinates(), strict=True
    ):
        assert storage.shard_region(coordinates) == region_of(indices[device], (3, 16))


def test_all_axes_left_over_split_it():
    mesh = gshard_tf.create_mesh({"data": 2, "model": 2, "sequence": 2}, "TPU")
    rules = gshard_tf.AxisRules(
        {"mlp": "model"}, paths=[("weight", (None, "mlp", None))]
    )
    weight_decision = CoreLayouts(mesh, rules).layout_for(Weight(4, 8, 12))
    # The largest dimension first, and each axis once: no core has another one's part.
    assert specs(weight_decision.storage) == ["sequence", "model", "data"]
