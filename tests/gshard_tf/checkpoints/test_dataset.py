"""A position in the input is found again."""

import numpy as np
import pytest
import tensorflow as tf

import gshard_tf


def numbers(**kwargs):
    tf.random.set_seed(1)
    dataset = tf.data.Dataset.range(30).shuffle(10, seed=2).repeat().batch(4)
    return gshard_tf.ResumableDataset(dataset.prefetch(3), **kwargs)


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
        gshard_tf.ResumableDataset(tf.data.Dataset.range(3))
    with pytest.raises(ValueError, match="`position` must be one of"):
        numbers(position="there")


def test_a_python_generator_is_counted():
    def make(position):
        def endless():
            yield from iter(range(10**9))

        spec = tf.TensorSpec((), tf.int64)
        dataset = tf.data.Dataset.from_generator(endless, output_signature=spec)
        return gshard_tf.ResumableDataset(dataset.repeat(), position)

    counted = make("count")
    take(counted, 2)
    other = make("count")
    other.restore(**counted.state())
    assert take(other, 2) == [2, 3]


def unsaveable():
    """By what TensorFlow cannot save: datasets without end that have it."""

    def ten():
        yield from range(10)

    def python(x):
        return tf.py_function(lambda y: y + 1, [x], tf.int64)

    def numpy(x):
        return tf.numpy_function(lambda y: y + 1, [x], tf.int64)

    def noisy(x):
        return x + tf.random.uniform((), maxval=9, dtype=tf.int64, seed=1)

    def inner(x):
        return tf.data.Dataset.range(x, x + 5).shuffle(5, seed=1)

    generator = tf.data.Dataset.from_generator(
        ten, output_signature=tf.TensorSpec((), tf.int64)
    )
    numbers = tf.data.Dataset.range(10)
    return {
        "generator": generator.repeat(),
        "generator, shuffled": generator.shuffle(4, seed=1).repeat(),
        "py_function, shuffled": numbers.map(python).shuffle(4, seed=1).repeat(),
        "py_function": numbers.repeat().map(python),
        "numpy_function": numbers.map(numpy).repeat(),
        "random operation": numbers.repeat().map(noisy),
        "inner shuffle": numbers.interleave(inner, cycle_length=2).repeat(),
    }


@pytest.mark.parametrize("kind", unsaveable())
def test_what_cannot_be_saved_is_refused_at_the_start(kind):
    dataset = unsaveable()[kind].batch(2).prefetch(1)
    with pytest.raises(ValueError, match="position='count'.* state outside"):
        gshard_tf.ResumableDataset(dataset)
    counted = gshard_tf.ResumableDataset(dataset, position="count")
    take(counted, 1)
    assert counted.state() == {"batches": 1, "iterator": None}


def test_a_full_cache_saves_nothing_of_what_lies_before():
    dataset = tf.data.Dataset.range(4).map(
        lambda x: tf.py_function(lambda y: y, [x], tf.int64)
    )
    data = gshard_tf.ResumableDataset(dataset.cache().repeat())
    take(data, 5)
    state = data.state()
    assert take(data, 2) == [1, 2]
    data.restore(**state)
    assert take(data, 2) == [1, 2]


def test_a_dataset_that_ends_before_the_position():
    def few(count):
        yield from range(count)

    for count in (0, 2):
        dataset = tf.data.Dataset.from_generator(
            few, args=[count], output_signature=tf.TensorSpec((), tf.int64)
        )
        data = gshard_tf.ResumableDataset(dataset, position="count")
        with pytest.raises(ValueError, match=f"after 3 .*a dataset of {count} batches"):
            data.restore(3, None)


def test_another_pipeline(tmp_path):
    state = numbers().state()
    other = gshard_tf.ResumableDataset(tf.data.Dataset.range(30).repeat())
    with pytest.raises(ValueError, match="another input pipeline"):
        other.restore(**state)
    assert np.ndim(state["batches"]) == 0


@pytest.mark.parametrize("position", ["iterator", "count"])
@pytest.mark.parametrize("batches", [0, 3])
def test_data_that_ends_says_so(position, batches):
    """Nobody could know: its length depends on its values."""
    dataset = tf.data.Dataset.range(8).filter(lambda i: i < batches)
    iterator = iter(gshard_tf.ResumableDataset(dataset, position).dataset)
    assert [int(next(iterator)) for _ in range(batches)] == [*range(batches)]
    with pytest.raises(
        tf.errors.InvalidArgumentError,
        match=rf"has ended\. It must be .*Batches received:\] \[{batches}\]",
    ):
        next(iterator)
