"""The layers within a Keras layer."""

import keras


def direct_sublayers(layer: keras.layers.Layer) -> list[keras.layers.Layer]:
    """Returns the layers that a layer owns directly, in the order of their creation.

    Relies on: `Layer._flatten_layers(include_self, recursive)`; layers have no public
    list of those within them. On an upgrade, watch: it still returns the direct ones
    only, for a functional model too.
    """
    return list(layer._flatten_layers(include_self=False, recursive=False))


def all_sublayers(layer: keras.layers.Layer) -> list[keras.layers.Layer]:
    """Returns the layers within a layer, at any depth.

    Relies on: `Layer._flatten_layers(include_self)`; the public `layers` of a
    subclassed model has the outermost only. On an upgrade, watch: layers within lists
    and within other layers are still among them.
    """
    return list(layer._flatten_layers(include_self=False))
