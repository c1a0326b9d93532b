"""The pieces that a process is to write: which, and in whose memory."""

import numpy as np
import parity
import pytest
import tensorflow as tf

import gshard_tf
from gshard_tf.checkpoints.snapshot import snapshot
from gshard_tf.compat.keras_variables import backend_variable
from gshard_tf.sharding.regions import ALIGNMENT


@pytest.fixture(scope="module")
def state():
    """One variable split over four devices, one that all of them hold, one on none."""
    strategy = parity.strategy_of(4, rules=gshard_tf.AxisRules({"expert": "expert"}))
    with strategy.scope():
        layer = parity.Experts(experts=8, width=6)
        layer.build([None, 8, 4])
        copied = tf.Variable(np.arange(12.0).reshape([4, 3]))
    found = {"model/wi": layer.wi, "model/copied": copied}

    @tf.function
    def step():
        for variable in (layer.wi, copied):
            variable.assign(variable + 1.0)
        return tf.constant(0)

    strategy.run(step)
    return {**found, "model/host": tf.Variable([1.0, 2.0])}


def of(pieces, name):
    return [piece for piece in pieces if piece.name == name]


def test_pieces_are_copies(state):
    """The next step reuses the memory of the values, while a thread writes them."""
    pieces = snapshot(state, is_chief=True)
    for name in ("model/wi", "model/copied"):
        views = [view for _, view in backend_variable(state[name]).addressable_shards()]
        copies = of(pieces, name)
        assert len(views) == len(copies) > 0
        for view, piece in zip(views, copies, strict=True):
            np.testing.assert_array_equal(piece.value, view)
            assert not np.shares_memory(piece.value, view), name
            # Where TensorFlow and XLA take memory as it is.
            assert piece.value.ctypes.data % ALIGNMENT == 0


def test_every_piece_comes_once(state):
    pieces = snapshot(state, is_chief=True)
    assert [p.region for p in of(pieces, "model/wi")] == [
        ((2 * i, 2), (0, 4), (0, 6)) for i in range(4)
    ]
    assert [p.region for p in of(pieces, "model/copied")] == [((0, 4), (0, 3))]
    assert len(of(pieces, "model/host")) == 1


def test_what_all_processes_have_is_for_the_chief(state):
    assert of(snapshot(state, is_chief=False), "model/host") == []
