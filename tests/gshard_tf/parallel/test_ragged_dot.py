"""Products of ragged groups: against products group by group."""

import jax
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from gshard_tf.parallel.ragged_dot import LARGEST, ragged_dot


def _expected(rows, matrices, sizes, d_outputs):
    """Results and gradients, one group after the other."""
    outputs, d_rows = np.zeros_like(d_outputs), np.zeros_like(rows)
    d_matrices = np.zeros_like(matrices)
    start = 0
    for group, size in enumerate(sizes):
        own = slice(start, start + size)
        outputs[own] = rows[own] @ matrices[group]
        d_rows[own] = d_outputs[own] @ matrices[group].T
        d_matrices[group] = rows[own].T @ d_outputs[own]
        start += size
    return outputs, d_rows, d_matrices


@jax.jit
def _run(rows, matrices, sizes, d_outputs):
    outputs, pull = jax.vjp(
        lambda rows, matrices: ragged_dot(rows, matrices, sizes), rows, matrices
    )
    return outputs, *pull(d_outputs)


def _check(sizes, count):
    """Of `count` rows, those after all groups are of no group."""
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(count, 3)).astype("f")
    matrices = rng.normal(size=(len(sizes), 3, 5)).astype("f")
    d_outputs = rng.normal(size=(count, 5)).astype("f")
    expected = _expected(rows, matrices, sizes, d_outputs)
    # Rows of no group affect nothing.
    rows[sum(sizes) :] = np.nan
    results = _run(rows, matrices, np.asarray(sizes, "int32"), d_outputs)
    for result, right in zip(results, expected, strict=True):
        np.testing.assert_allclose(result, right, rtol=1e-4, atol=1e-4)


# All of one shape: it is compiled once.
@settings(max_examples=20)
@given(st.lists(st.integers(0, 40), min_size=4, max_size=4))
def test_groups_of_any_size(sizes):
    _check(sizes, 165)


def test_full_blocks_and_one_that_fits():
    sizes = [3, 2 * LARGEST + 70, 0, LARGEST, 1]
    _check(sizes, sum(sizes) + 5)
