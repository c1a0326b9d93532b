"""The promises of Keras that `gshard_tf.compat.keras_optimizers` relies on."""

import keras
import pytest

from gshard_tf.compat import keras_optimizers


def test_an_adafactor_is_built_with_the_slots_that_it_is_given():
    weights = [keras.Variable([[1.0, 2.0]]), keras.Variable([3.0])]
    optimizer = keras.optimizers.Adafactor()
    slots = {
        id(weights[0]): (keras.Variable([1.0]), keras.Variable([1.0, 1.0]), None),
        id(weights[1]): (None, None, keras.Variable([1.0])),
    }
    keras_optimizers.build_adafactor(
        optimizer, weights, lambda variable: slots[id(variable)]
    )
    assert optimizer.built
    # The counter of steps, the learning rate and these slots; none of Keras's own.
    assert len(optimizer.variables) == 2 + 3
    rows, columns = keras_optimizers.adafactor_factors(optimizer, weights[0])
    assert rows is slots[id(weights[0])][0]
    assert columns is slots[id(weights[0])][1]
    # Keras's own step uses the slot of a weight of one dimension, and no factor.
    optimizer.update_step(keras.ops.ones([1]) * 2.0, weights[1], 0.1)
    # In the first step nothing is left of the slot's value, and 2.0 is squared.
    assert float(slots[id(weights[1])][2][0]) == pytest.approx(4.0)


@pytest.mark.parametrize(
    ("rate", "scheduled"),
    [(0.1, False), (keras.optimizers.schedules.ExponentialDecay(0.1, 1, 0.5), True)],
)
def test_a_schedule_is_known(rate, scheduled):
    optimizer = keras.optimizers.Adafactor(rate)
    assert keras_optimizers.has_scheduled_rate(optimizer) is scheduled
