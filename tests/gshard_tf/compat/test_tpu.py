"""The promises of TensorFlow that `gshard_tf.compat.tpu` relies on.

What needs a strategy on a slice is in tests/gshard_tf/tpu, in processes of its own.
"""

import inspect

import numpy as np
import pytest
import tensorflow as tf

from gshard_tf.compat import tpu
from gshard_tf.sharding import op_sharding


def test_a_tpu_strategy_still_packs_and_numbers_its_cores():
    constructor = inspect.getsource(tf.distribute.TPUStrategy.__init__)
    assert "self._enable_packed_variable_in_eager_mode = True" in constructor
    assert "self._tpu_devices = " in inspect.getsource(tpu.TPUExtended.__init__)


def test_a_strategy_is_found_from_its_extended_half():
    strategy = tf.distribute.OneDeviceStrategy("CPU:0")
    assert tpu.strategy_of(strategy.extended) is strategy


@pytest.mark.parametrize("synchronization", ["ON_WRITE", "ON_READ"])
def test_the_class_of_a_variable_is_that_of_its_synchronization(synchronization):
    created = tpu.create_distributed_variable(
        tf.distribute.OneDeviceStrategy("CPU:0"),
        lambda **kwargs: [tf.Variable(1.0)],
        lambda strategy, values, aggregation: "ON_WRITE",
        lambda strategy, values, aggregation: "ON_READ",
        synchronization=tf.VariableSynchronization[synchronization],
    )
    assert created == synchronization


def test_no_tpu_program_is_traced_outside_of_one():
    assert not tpu.in_tpu_program()
    tf.function(lambda: not tpu.in_tpu_program() or 1 / 0).get_concrete_function()


def test_a_partitioned_input_has_its_sharding():
    sharding = op_sharding.tiled(np.arange(2).reshape(2, 1))

    def program(a, b):
        whole = tpu.partitioned_input([a, b], [2, 1], sharding)
        assert whole.op.type == "TPUPartitionedInputV2"
        assert whole.op.get_attr("_XlaSharding") == sharding
        assert list(whole.op.get_attr("partition_dims")) == [2, 1]
        return 0

    halves = [tf.TensorSpec([2, 4])] * 2
    tf.function(program, autograph=False).get_concrete_function(*halves)


@pytest.mark.parametrize("kind", ["add", "sub", "update"])
def test_rows_are_updated_by_one_operation(kind):
    variable = tf.Variable(tf.zeros([4, 2]))
    delta = tf.IndexedSlices(tf.ones([2, 2]), tf.constant([3, 1]))

    def program():
        return tpu.scatter_in_program(kind, variable, delta)

    function = tf.function(program, autograph=False).get_concrete_function()
    name = f"ResourceScatter{kind.capitalize()}"
    assert [op.type for op in function.graph.get_operations()].count(name) == 1
    new = -1.0 if kind == "sub" else 1.0
    assert function().numpy()[:, 0].tolist() == [0.0, new, 0.0, new]
