"""Seed generators: the promise of `compat.keras_seeds` on states that exist."""

import keras

from gshard_tf.compat.keras_seeds import SeedGeneratorOfState


def test_a_layer_tracks_the_state_as_a_seed():
    state = keras.Variable([[1, 0], [2, 0]], dtype="uint32", trainable=False)
    layer = keras.layers.Layer()
    layer.generators = [SeedGeneratorOfState(state, "seeds")]
    assert [v is state for v in layer.variables] == [True]
    assert not layer.weights
