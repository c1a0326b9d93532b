"""Extended halves of TensorFlow's strategies."""

from tensorflow.python.distribute import one_device_strategy

# The extended half of OneDeviceStrategy, which feeds one global batch to one replica.
# Relies on: `_create_variable`, `_call_for_each_replica`, `_scope`, `_device` and
# `_container_strategy`. On an upgrade, watch: these, and what `fit` calls besides.
OneDeviceExtended = one_device_strategy.OneDeviceExtended
