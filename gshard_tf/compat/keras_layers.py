"""The layers within a Keras layer."""

import keras


def direct_sublayers(layer: keras.layers.Layer) -> list[keras.layers.Layer]:
    """Returns the layers that a layer owns directly, in the order of their creation.

    Relies on: `Layer._flatten_layers(include_self, recursive)`; layers have no public
    list of those within them. On an upgrade, watch: it still returns the direct ones
    only, for a functional model too.
    """
    return list(layer._flatten_layers(include_self=False, recursive=False))
