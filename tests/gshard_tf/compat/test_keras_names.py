"""Counters of names: the promise of `compat.keras_names`."""

import keras

from gshard_tf.compat.keras_names import own_names


def test_names_begin_anew_and_go_on_afterwards():
    before = keras.layers.Dense(1).name
    with own_names():
        assert [keras.layers.Dense(1).name for _ in range(2)] == ["dense", "dense_1"]
    number = int(before.rpartition("_")[2]) if "_" in before else 0
    assert keras.layers.Dense(1).name == f"dense_{number + 1}"
