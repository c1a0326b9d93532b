"""Whose memory values are in, and which of them a step may not change."""

import numpy as np
import parity
import tensorflow as tf


def scoped(*values, mesh=4):
    strategy = parity.strategy_of(mesh)
    with strategy.scope():
        return strategy, [tf.Variable(value) for value in values]


def test_a_value_that_was_read_is_a_copy():
    strategy, [variable] = scoped(np.arange(12.0))

    @tf.function
    def step():
        variable.assign_add(tf.ones([12], variable.dtype))
        return tf.constant(0)

    strategy.run(step)
    on_devices = variable.device_copy
    read = strategy.extended.transfer.to_host(on_devices)
    np.testing.assert_array_equal(read, np.arange(12.0) + 1)
    # The next step is given the memory of the devices for its new values.
    for shard in on_devices.addressable_shards:
        assert not np.shares_memory(read, np.asarray(shard.data))


def test_what_was_infinite_before_may_stay_so():
    strategy, [best, weight] = scoped(np.float32(np.inf), np.float32(1.0))

    @tf.function
    def step(x):
        best.assign(tf.minimum(best, tf.constant(np.inf)))
        weight.assign(weight * x)
        return tf.constant(0)

    strategy.extended.keep_finite = True
    strategy.run(step, args=(tf.constant(2.0),))
    assert weight.numpy() == 2.0 and strategy.extended.skipped_steps == []
    strategy.run(step, args=(tf.constant(np.nan),))
    assert weight.numpy() == 2.0 and len(strategy.extended.skipped_steps) == 1


def test_a_skipped_batch_is_a_copy():
    strategy, [weight] = scoped(np.float32(1.0))

    @tf.function
    def step(x):
        weight.assign(weight * tf.reduce_sum(x))
        return tf.constant(0)

    strategy.extended.keep_finite = True
    strategy.run(step, args=(tf.fill([16], np.float32(np.nan)),))
    [skipped] = strategy.extended.skipped_steps
    [array] = skipped.arrays
    # TensorFlow's memory is its own, to be used for the next batch.
    assert array.flags.owndata and array.base is None
    assert np.all(np.isnan(array)) and array.shape == (16,)
