"""First values, one shard at a time, against the whole as Keras computes it."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from gshard_tf.random.random_shards import NotShardable, shardable_initializer
from gshard_tf.sharding import initial_value
from gshard_tf.sharding.regions import cut
from keras_layers.initializers import matrix_fan, per_expert_fan

SHAPE = (6, 20, 14)
INITIALIZERS = {
    "glorot_uniform": keras.initializers.GlorotUniform(seed=1),
    "he_normal": keras.initializers.HeNormal(seed=1),
    "normal": keras.initializers.RandomNormal(0.5, 2.0, seed=1),
    "truncated": keras.initializers.TruncatedNormal(seed=1),
    "uniform": keras.initializers.RandomUniform(-3.0, 1.0, seed=1),
    "zeros": keras.initializers.Zeros(),
    "constant": keras.initializers.Constant(2.5),
    "per_expert": per_expert_fan(keras.initializers.HeNormal(seed=1), "wi"),
    "matrix_fan": matrix_fan(keras.initializers.GlorotNormal(seed=1), 120, 14, "query"),
}


@pytest.mark.parametrize("name", INITIALIZERS)
def test_a_run_of_elements_is_that_of_the_whole(name):
    # Large enough that TensorFlow computes it in several threads.
    shape = (60, 100, 14)
    initializer = INITIALIZERS[name]
    if name == "matrix_fan":
        initializer = matrix_fan(
            keras.initializers.GlorotNormal(seed=1), 6000, 14, "query"
        )
    whole = np.ravel(initializer(shape, dtype="float32"))
    part = shardable_initializer(lambda: initializer(shape, dtype="float32"))
    for start, stop in [(0, 7), (4, 8), (5, 4099), (70_001, 84_000)]:
        np.testing.assert_array_equal(part(start, stop), whole[start:stop])


@pytest.mark.parametrize("name", INITIALIZERS)
def test_boxes(monkeypatch, name):
    monkeypatch.setattr(initial_value, "WHOLE_BYTES", 0)
    monkeypatch.setattr(initial_value, "_CHUNK", 600)  # two rows at a time

    def whole_is_forbidden(self):
        raise AssertionError("the whole was computed")

    monkeypatch.setattr(initial_value.InitialValue, "whole", whole_is_forbidden)
    initializer = INITIALIZERS[name]
    whole = np.array(initializer(SHAPE, dtype="float32"))
    value = initial_value.InitialValue(
        lambda: initializer(SHAPE, dtype="float32"), SHAPE, "float32"
    )
    read = value.reader()
    for box in [
        ((2, 2), (0, 20), (0, 14)),
        ((0, 6), (10, 10), (0, 14)),
        ((3, 3), (0, 10), (7, 7)),
    ]:
        np.testing.assert_array_equal(read(box), cut(whole, box))


@pytest.mark.parametrize(
    "make",
    [
        lambda: keras.initializers.Orthogonal(seed=1)((8, 8), dtype="float32"),
        lambda: keras.initializers.GlorotUniform(seed=1)((8, 8), dtype="float64"),
        lambda: tf.random.stateless_uniform([8, 8], [1, 2]) + tf.range(8.0),
        lambda: tf.ones([8, 8]) * tf.random.stateless_uniform([8, 1], [1, 2]),
    ],
)
def test_what_has_no_parts(make):
    with pytest.raises(NotShardable):
        shardable_initializer(make)


def test_what_has_no_parts_is_made_whole(monkeypatch):
    monkeypatch.setattr(initial_value, "WHOLE_BYTES", 0)
    make = keras.initializers.Orthogonal(seed=1)
    value = initial_value.InitialValue(
        lambda: make((8, 8), dtype="float32"), (8, 8), "float32"
    )
    read, whole = value.reader(), make((8, 8), dtype="float32")
    np.testing.assert_array_equal(read(((4, 4), (0, 8))), whole[4:])
    np.testing.assert_array_equal(read(((0, 8), (0, 8))), whole)


def test_a_box_is_cut_from_short_runs(monkeypatch):
    monkeypatch.setattr(initial_value, "WHOLE_BYTES", 0)
    monkeypatch.setattr(initial_value, "_CHUNK", 600)
    runs = []

    def recorded(compute):
        elements = shardable_initializer(compute)

        def run(start, stop):
            runs.append(stop - start)
            return elements(start, stop)

        return run

    monkeypatch.setattr(initial_value, "shardable_initializer", recorded)
    initializer = INITIALIZERS["uniform"]
    value = initial_value.InitialValue(
        lambda: initializer(SHAPE, dtype="float32"), SHAPE, "float32"
    )
    value.reader()(((0, 6), (10, 10), (0, 14)))
    # Never more elements at a time than that: the host would hold them.
    assert sum(runs) >= np.prod(SHAPE) and max(runs) <= 600


def test_the_counter_carries():
    def make():
        return tf.raw_ops.StatelessRandomUniformV2(
            shape=[64],
            key=tf.constant([3], tf.uint64),
            counter=tf.constant(np.array([2**64 - 5, 7], np.uint64)),
            alg=1,
        )

    # Element 40 is in the tenth group of four, beyond the low half's end.
    np.testing.assert_array_equal(shardable_initializer(make)(40, 64), make()[40:])
