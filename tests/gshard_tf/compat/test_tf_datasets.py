"""The promises of TensorFlow that `gshard_tf.compat.tf_datasets` relies on."""

import pytest
import tensorflow as tf

from gshard_tf.compat.tf_datasets import iterator_resource, operations_with_state


def mapped():
    dataset = tf.data.Dataset.range(4)
    return dataset.map(lambda x: tf.py_function(lambda y: y, [x], tf.int64))


def test_functions_of_all_inputs_are_seen():
    zipped = tf.data.Dataset.zip(tf.data.Dataset.range(4), mapped().shuffle(2))
    assert operations_with_state(zipped.batch(2).prefetch(1)) == ["EagerPyFunc"]
    assert operations_with_state(mapped().cache()) == []


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d.map(lambda x: x + 1, num_parallel_calls=2).filter(lambda x: x > 1),
        lambda d: d.interleave(lambda x: tf.data.Dataset.range(x), cycle_length=2),
        lambda d: d.shuffle(4, seed=1),
        lambda d: d.map(lambda x: tf.random.stateless_uniform((), [x, 1])),
    ],
)
def test_what_tensorflow_saves_has_none(change):
    iterator = iter(change(tf.data.Dataset.range(9).repeat()))
    next(iterator)
    assert operations_with_state(change(tf.data.Dataset.range(9).repeat())) == []
    saved = tf.raw_ops.SerializeIterator(
        resource_handle=iterator_resource(iterator), external_state_policy=2
    )
    assert saved.shape.rank == 1


def test_a_position_is_saved_and_restored_by_the_handle():
    iterator = iter(tf.data.Dataset.range(9))
    next(iterator)
    saved = tf.raw_ops.SerializeIterator(
        resource_handle=iterator_resource(iterator), external_state_policy=2
    )
    assert [int(next(iterator)), int(next(iterator))] == [1, 2]
    tf.raw_ops.DeserializeIterator(
        resource_handle=iterator_resource(iterator), serialized=saved
    )
    assert int(next(iterator)) == 1
