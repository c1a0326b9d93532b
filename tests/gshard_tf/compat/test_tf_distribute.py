"""Extended halves of TensorFlow's strategies."""

import tensorflow as tf

from gshard_tf.compat.tf_distribute import OneDeviceExtended


def test_variables_and_steps_pass_through_the_extended_half():
    calls = []

    class Extended(OneDeviceExtended):
        def _create_variable(self, next_creator, **kwargs):
            calls.append("create")
            return super()._create_variable(next_creator, **kwargs)

        def _call_for_each_replica(self, fn, args, kwargs):
            calls.append("run")
            return super()._call_for_each_replica(fn, args, kwargs)

    class Strategy(tf.distribute.Strategy):
        def __init__(self):
            super().__init__(Extended(self, "/cpu:0"))

    strategy = Strategy()
    with strategy.scope():
        variable = tf.Variable(1.0)
    assert float(strategy.run(lambda: variable + 1.0)) == 2.0
    assert calls == ["create", "run"]
    assert strategy.extended._container_strategy() is strategy
