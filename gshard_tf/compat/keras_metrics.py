"""The direction in which a Keras metric gets better."""

from typing import Literal

import keras


def set_direction(metric: keras.metrics.Metric, better: Literal["up", "down"]) -> None:
    """Tells callbacks with `mode="auto"` whether more or less of a metric is better.

    Relies on: the attribute `_direction`, which Keras's own metrics have;
    `EarlyStopping` and `ModelCheckpoint` read it of the metric that they monitor, and
    raise without it. On an upgrade, watch: they still do.
    """
    metric._direction = better
