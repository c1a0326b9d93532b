"""What is rounded to a whole number is the same number for all that use it."""

import numpy as np
import parity
import pytest
import tensorflow as tf
from xla_flags import EMITTER, TWO_EMITTERS

from gshard_tf.compat import xla
from gshard_tf.spmd import lowering


@pytest.fixture(autouse=True)
def _as_users_compile(monkeypatch):
    """The emitter that `one_process.py` turns off is the one that is wrong."""
    if TWO_EMITTERS:
        monkeypatch.setitem(xla._CPU, EMITTER, True)


def resized(x):
    """Bilinear, by factors of which one has no exact inverse."""
    return tf.image.resize(x, [12, 12])


def on_mesh(devices):
    x = np.random.default_rng(0).normal(size=(2, 4, 6, 2)).astype("float32")
    strategy = parity.strategy_of(devices)
    got = strategy.run(tf.function(resized, autograph=False), args=(tf.constant(x),))
    return parity.relative_difference(got, resized(x))


@pytest.mark.parametrize("devices", [1, 2])
def test_bilinear_resizing_equals_tensorflows_kernel(devices):
    assert on_mesh(devices) < 1e-5


@pytest.mark.skipif(not TWO_EMITTERS, reason="jaxlib 0.12 has it mended")
def test_the_compiler_still_needs_it(monkeypatch):
    monkeypatch.setattr(lowering, "compute_rounding_once", lambda module: False)
    assert on_mesh(1) > 0.1
