"""Which values of a metric are better, as Keras's callbacks read it."""

import keras
import numpy as np

from gshard_tf.compat.keras_metrics import set_direction


def test_callbacks_read_the_direction():
    for better, greater in (("up", True), ("down", False)):
        metric = keras.metrics.MeanAbsoluteError(name="m")
        set_direction(metric, better)
        model = keras.Sequential([keras.Input([1]), keras.layers.Dense(1)])
        model.compile("sgd", "mse", metrics=[metric])
        stop = keras.callbacks.EarlyStopping("val_m")
        x = np.ones([2, 1], np.float32)
        model.fit(x, x, validation_data=(x, x), callbacks=[stop], verbose=0)
        assert bool(stop.monitor_op(2.0, 1.0)) is greater
