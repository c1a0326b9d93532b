"""The test for NaN and infinity."""

import jax.numpy as jnp
import numpy as np
import pytest
import tensorflow as tf

from gshard_tf.spmd.nonfinite import is_finite


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_arrays_and_tensors(bad, dtype):
    for of in (
        lambda x: tf.constant(x, dtype),
        lambda x: tf.constant(x, dtype).numpy(),
        lambda x: jnp.array(x, dtype),
    ):
        assert is_finite(of([0.0, 1.0]))
        assert not is_finite(of([0.0, bad]))


def test_nests_and_what_has_no_infinity():
    assert is_finite({"a": [tf.constant([1, 2]), None, "text", np.array([True])]})
    assert not is_finite({"a": [tf.constant([1, 2]), np.array([1.0, np.nan])]})
    assert not is_finite(np.array([1.0 + 1j * np.inf]))
