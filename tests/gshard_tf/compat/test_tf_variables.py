"""Resource variables, extended or imitated."""

import keras
import tensorflow as tf

from gshard_tf.compat.tf_variables import (
    OwnContainer,
    ResourceVariable,
    ResourceVariableLike,
    notify_tapes,
)


def test_a_variable_is_a_resource_variable():
    assert isinstance(tf.Variable(1.0), ResourceVariable)


def test_no_strategy_creates_it_in_its_place():
    with tf.distribute.MirroredStrategy(["CPU:0"]).scope():
        variable = ResourceVariable([1.0], name="weight", trainable=False)
        assert type(tf.Variable([1.0])) is not ResourceVariable
    assert type(variable) is ResourceVariable
    assert variable.numpy() == [1.0]


def test_methods_reach_the_resource_through_its_handle():
    """And eager operations that are implemented in C++ through `_handle`."""
    reads = []

    class Watched(ResourceVariable):
        @property
        def handle(self):
            reads.append("handle")
            return self._resource

        @property
        def _handle(self):
            reads.append("_handle")
            return self._resource

        @_handle.setter
        def _handle(self, handle):
            self._resource = handle

    variable = Watched(1.0)
    for use in (
        variable.read_value,
        lambda: variable.assign(2.0),
        lambda: variable.assign_add(1.0),
        lambda: variable.sparse_read([]) if variable.shape.rank else variable.value(),
        lambda: tf.raw_ops.AddV2(x=variable, y=1.0),
    ):
        reads.clear()
        use()
        assert reads


def test_tapes_watch_what_only_looks_like_one():
    class Like(ResourceVariableLike):
        _name = "like"
        trainable = True
        shape = tf.TensorShape([])
        dtype = tf.float32

        def __init__(self):
            self.handle = tf.constant(3.0)

    variable = Like()
    with tf.GradientTape() as tape:
        notify_tapes(variable)
        y = variable.handle * variable.handle
    assert float(tape.gradient(y, variable.handle)) == 6.0


def test_an_optimizer_that_is_built_takes_no_handle():
    taken = []

    class Watched(OwnContainer, ResourceVariable):
        @property
        def handle(self):
            taken.append(self)
            return self._handle

    weight = keras.Variable(Watched([1.0]))
    del taken[:]
    optimizer = keras.optimizers.SGD(0.5)
    optimizer.build([weight])
    assert not taken
    optimizer.apply([keras.ops.ones([1])])
    assert weight.numpy() == [0.5]
