"""The promises of Keras that `gshard_tf.compat.keras_fit` relies on."""

import keras
import numpy as np
import parity
import pytest
import tensorflow as tf

from gshard_tf.compat.keras_fit import TFEpochIterator


def test_an_epoch_iterator_asks_its_strategy_for_the_dataset():
    strategy = parity.strategy_of({"data": 2})
    with strategy.scope():
        made = TFEpochIterator(
            x=np.ones((4, 1)), batch_size=2, distribute_strategy=strategy
        )
    assert type(made) is not TFEpochIterator
    assert isinstance(made, TFEpochIterator)
    plain = TFEpochIterator(
        x=np.ones((4, 1)), distribute_strategy=tf.distribute.get_strategy()
    )
    assert type(plain) is TFEpochIterator


def test_a_scope_hides_no_error_but_those_of_building():
    scope = parity.strategy_of({"data": 2}).scope()
    with pytest.raises(ZeroDivisionError), scope:
        raise ZeroDivisionError


def test_an_error_of_the_optimizer_is_not_hidden():
    with parity.strategy_of({"data": 2}).scope():
        model = parity.classifier()
        model.compile(keras.optimizers.Adam(), "mse")
    model.optimizer.build = lambda variables: 1 / 0
    x, _ = parity.data(4)
    with pytest.raises(ZeroDivisionError):
        model.fit(x, np.ones((4, 3)), verbose=0)
