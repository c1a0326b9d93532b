"""What TensorFlow's bridge could not store is split further, or stored whole."""

import pytest
import tensorflow as tf

import gshard_tf
from gshard_tf.sharding.sharded_variable import MeshVariableBase
from gshard_tf.tpu.layouts import CoreLayouts


class Weight(MeshVariableBase):
    """As much of a variable as layouts look at."""

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
    found = layouts.layout_for(weight)
    slot = layouts.layout_for(Weight(*shape, reference=weight))
    return found, slot


def specs(layout):
    return [None if spec == "unsharded" else spec for spec in layout.sharding_specs]


def test_the_axis_left_over_splits_the_largest_dimension_that_divides():
    found, slot = decided((None, "mlp", None), 4, 8, 12)
    assert specs(found.layout) == [None, "model", "data"]
    assert specs(found.use) == [None, "model", None]
    # A slot is used where it lies.
    assert specs(slot.layout) == [None, "model", "data"]
    assert slot.use is None


@pytest.mark.parametrize(("axes", "shape"), [(("mlp",), (8,)), (("mlp", None), (8, 3))])
def test_whole_where_nothing_divides(axes, shape):
    found, slot = decided(axes, *shape)
    assert found.layout.is_fully_replicated()
    assert specs(found.use) == ["model", None][: len(shape)]
    assert "whole" in found.rule
    assert slot.layout.is_fully_replicated()


@pytest.mark.parametrize(
    ("axes", "wanted"),
    [(("batch", "mlp"), ["data", "model"]), ((None, None), [None, None])],
)
def test_what_has_no_copies_or_no_parts_stays(axes, wanted):
    found, _ = decided(axes, 8, 8)
    assert specs(found.layout) == wanted
    assert found.use is None


def test_all_axes_left_over_split_it():
    mesh = gshard_tf.create_mesh({"data": 2, "model": 2, "sequence": 2}, "TPU")
    rules = gshard_tf.AxisRules(
        {"mlp": "model"}, paths=[("weight", (None, "mlp", None))]
    )
    found = CoreLayouts(mesh, rules).of(Weight(4, 8, 12))
    # The largest dimension first, and each axis once: no core has another one's part.
    assert specs(found.layout) == ["sequence", "model", "data"]
