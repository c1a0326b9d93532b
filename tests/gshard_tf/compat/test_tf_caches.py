"""The promises of TensorFlow that `gshard_tf.compat.tf_caches` relies on."""

import pytest
import tensorflow as tf

from gshard_tf.compat.tf_caches import FileCache, caches_in_state, file_caches


def state_after(dataset, batches):
    iterator = iter(dataset)
    for _ in range(batches):
        next(iterator)
    return tf.raw_ops.SerializeIterator(
        resource_handle=iterator._iterator_resource, external_state_policy=2
    )


def numbers(file):
    return tf.data.Dataset.range(8).cache(str(file))


def test_caches_of_a_dataset(tmp_path):
    first, second, third = (str(tmp_path / name) for name in "abc")
    shared = numbers(third)
    dataset = tf.data.Dataset.zip(
        numbers(first).map(lambda x: (x, tf.strings.as_string(x))).cache(second),
        tf.data.Dataset.range(2).cache().flat_map(lambda _: shared),
    )
    caches = file_caches(dataset.shuffle(3).repeat().batch(2).prefetch(1))
    assert caches == [
        FileCache(first, (tf.int64,)),
        FileCache(second, (tf.int64, tf.string)),
        FileCache(third, (tf.int64,)),
    ]
    assert file_caches(tf.data.Dataset.range(2).cache()) == []


@pytest.mark.parametrize(
    ("batches", "wanted"), [(0, [False]), (1, [False]), (4, [True])]
)
def test_a_state_tells_whether_a_cache_is_read(tmp_path, batches, wanted):
    dataset = numbers(tmp_path / "c").repeat().batch(3)
    assert caches_in_state(state_after(dataset, batches)) == wanted


def test_a_large_state(tmp_path):
    held = tf.data.Dataset.range(3000).cache().shuffle(2000, seed=1)
    dataset = tf.data.Dataset.zip(held.repeat(), numbers(tmp_path / "c").repeat())
    assert caches_in_state(state_after(dataset, 10)) == [True]
    assert caches_in_state(state_after(held.repeat(), 4000)) == []


def test_the_order_of_several(tmp_path):
    # Twelve, as "[10]" comes before "[2]" in the alphabet. The odd ones are longer.
    parts = [
        tf.data.Dataset.range(30 if i % 2 else 2).cache(str(tmp_path / f"{i}")).repeat()
        for i in range(12)
    ]
    dataset = tf.data.Dataset.zip(*parts).batch(1)
    caches = file_caches(dataset)
    assert [cache.file for cache in caches] == [
        str(tmp_path / f"{i}") for i in range(12)
    ]
    assert caches_in_state(state_after(dataset, 5)) == [i % 2 == 0 for i in range(12)]


@pytest.mark.parametrize("inputs", [1, 2])
def test_the_order_of_a_cache_of_a_cache(tmp_path, inputs):
    inner = numbers(tmp_path / "inner")
    list(inner)
    dataset = tf.data.Dataset.zip(*[inner, tf.data.Dataset.range(8)][:inputs])
    dataset = dataset.cache(str(tmp_path / "outer")).repeat()
    assert [cache.file[-5:] for cache in file_caches(dataset)] == ["inner", "outer"]
    assert caches_in_state(state_after(dataset, 3)) == [True, False]


def test_a_cache_inside_a_function_has_no_state(tmp_path):
    """So it need not be found."""
    dataset = tf.data.Dataset.range(3).flat_map(lambda _: numbers(tmp_path / "c"))
    with pytest.raises(tf.errors.FailedPreconditionError):
        state_after(dataset.repeat(), 2)


@pytest.mark.parametrize("components", [1, 2, 10, 12])
def test_keys(tmp_path, components):
    file = str(tmp_path / "c")
    dataset = tf.data.Dataset.range(1).map(lambda x: (x,) * components).cache(file)
    list(dataset)
    [cache] = file_caches(dataset)
    stored = tf.train.load_checkpoint(file).get_variable_to_dtype_map()
    assert stored == {cache.key(i): tf.int64 for i in range(components)}
