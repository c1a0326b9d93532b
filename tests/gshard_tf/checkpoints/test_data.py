"""A position in the input is found again."""

import numpy as np
import pytest
import tensorflow as tf

import gshard_tf


def numbers(**kwargs):
    tf.random.set_seed(1)
    dataset = tf.data.Dataset.range(30).shuffle(10, seed=2).repeat().batch(4)
    return gshard_tf.ResumableData(dataset.prefetch(3), **kwargs)


def take(data, count):
    return [value.numpy().tolist() for value in data.dataset.take(count)]


@pytest.mark.parametrize("kinds", [("iterator", "iterator"), ("count", "count")])
def test_going_on(kinds):
    wanted = take(numbers(), 20)
    first, second = (numbers(position=kind) for kind in kinds)
    assert take(first, 11) == wanted[:11]
    state = first.state()
    take(first, 3)
    second.restore(**state)
    assert second.batches_taken == 11
    assert take(second, 9) == wanted[11:]
    # Back again, in the same process.
    first.restore(**state)
    assert take(first, 2) == wanted[11:13]
    first.restore(0, None)
    assert take(first, 20) == wanted


def test_every_iterator_goes_on_where_the_last_one_stopped():
    data = numbers()
    assert take(data, 3) + take(data, 3) == take(numbers(), 6)


def test_a_dataset_that_ends():
    with pytest.raises(ValueError, match="Received: a dataset of 3 batches"):
        gshard_tf.ResumableData(tf.data.Dataset.range(3))
    with pytest.raises(ValueError, match="position is one of"):
        numbers(position="there")


def test_a_python_generator_is_counted():
    def make(position):
        def endless():
            yield from iter(range(10**9))

        spec = tf.TensorSpec((), tf.int64)
        dataset = tf.data.Dataset.from_generator(endless, output_signature=spec)
        return gshard_tf.ResumableData(dataset.repeat(), position)

    data = make("iterator")
    take(data, 2)
    with pytest.raises(ValueError, match="position='count'"):
        data.state()
    counted = make("count")
    take(counted, 2)
    other = make("count")
    other.restore(**counted.state())
    assert take(other, 2) == [2, 3]


def test_another_pipeline(tmp_path):
    state = numbers().state()
    other = gshard_tf.ResumableData(tf.data.Dataset.range(30).repeat())
    with pytest.raises(ValueError, match="another input pipeline"):
        other.restore(**state)
    assert np.ndim(state["batches"]) == 0
