"""Products of ragged groups: against products group by group."""

import functools
import re

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gshard_tf.parallel.ragged_dot import LARGEST, ragged_dot
from gshard_tf.parallel.ragged_dot_tpu import fits, gradients_in_tiles, in_tiles


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


@functools.partial(jax.jit, static_argnames="spare")
def _run(rows, matrices, sizes, d_outputs, spare):
    def dot(rows, matrices):
        return ragged_dot(rows, matrices, sizes, spare)

    outputs, pull = jax.vjp(dot, rows, matrices)
    return outputs, *pull(d_outputs)


def _check(sizes, count, width=3, spare=1):
    """Of `count` rows, those after all groups are of no group."""
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(count, width)).astype("f")
    matrices = rng.normal(size=(len(sizes), width, 5)).astype("f")
    d_outputs = rng.normal(size=(count, 5)).astype("f")
    expected = _expected(rows, matrices, sizes, d_outputs)
    # Rows of no group affect nothing.
    rows[sum(sizes) :] = np.nan
    results = _run(rows, matrices, np.asarray(sizes, "int32"), d_outputs, spare)
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


@pytest.mark.parametrize("hot", [127, 128, 2 * 128 + 32 + 17])
@pytest.mark.parametrize("spare", [1, 4])
def test_a_group_of_many_times_the_others(hot, spare):
    """Blocks of two sizes; and one that ends where the array does."""
    sizes = [1] * 7 + [hot, 0, 5]
    _check(sizes, 8 * 40, spare=spare)
    _check(sizes, sum(sizes), spare=spare)


@pytest.mark.parametrize(("after", "width"), [(0, 3), (1, 40), (60, 16)])
def test_few_rows(after, width):
    _check([3, 0, 2, 0, 1], 6 + after, width)


@pytest.mark.parametrize("count", [2, 64])
def test_a_few_rows_read_matrices_where_they_lie(count):
    """In bfloat16, too, with sums in float32. No matrix is copied or converted."""
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(count, 40)).astype(jax.numpy.bfloat16)
    matrices = rng.normal(size=(16, 40, 24)).astype(jax.numpy.bfloat16)
    sizes = np.zeros(16, "int32")
    sizes[[3, 9]] = 1
    compiled = jax.jit(ragged_dot).lower(rows, matrices, sizes).compile()
    outputs = np.asarray(compiled(rows, matrices, sizes), "f")
    expected = np.einsum(
        "RM,RMH->RH", rows[:2].astype("f"), matrices[[3, 9]].astype("f")
    )
    np.testing.assert_allclose(outputs[:2], expected, rtol=0.01, atol=0.01)
    np.testing.assert_array_equal(outputs[2:], 0)
    copies = r"= \w+\[(1,)?40,24\]\S* (copy|convert|fusion|dynamic-slice)\("
    found = re.findall(copies, compiled.as_text())
    # With many rows the blocks are there, too, in a branch that is not taken.
    assert bool(found) == (count == 64)


@pytest.mark.parametrize(
    ("sizes", "count", "width"),
    [
        ([3, 300, 0, 128, 1], 500, 1024),
        ([0, 100, 28, 0], 128, 24),  # all rows, and groups at both ends without any
        ([0, 0, 5], 7, 8),  # less than a tile
        ([0, 0], 130, 8),
    ],
)
def test_kernels_of_a_tpu(sizes, count, width):
    """Interpreted: here is no TPU."""
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(count, width)).astype("f")
    matrices = rng.normal(size=(len(sizes), width, 16)).astype("f") / width**0.5
    d_outputs = rng.normal(size=(count, 16)).astype("f")
    expected = _expected(rows, matrices, sizes, d_outputs)
    rows[sum(sizes) :] = np.nan
    rows, matrices, d_outputs = map(jax.numpy.asarray, (rows, matrices, d_outputs))
    sizes = np.asarray(sizes, "int32")
    assert fits(rows, matrices)
    results = [
        in_tiles(rows, matrices, sizes, 1, interpret=True),
        *gradients_in_tiles(rows, matrices, sizes, d_outputs, 1, interpret=True),
    ]
    for result, right in zip(results, expected, strict=True):
        np.testing.assert_allclose(result, right, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    ("width", "dtype", "expected"),
    [(384, "float32", True), (640, "bfloat16", True), (600, "float32", False),
     (384, "float16", False)],
)  # fmt: skip
def test_what_the_kernels_multiply(width, dtype, expected):
    rows = jax.ShapeDtypeStruct((64, 128), dtype)
    assert fits(rows, jax.ShapeDtypeStruct((2, 128, width), dtype)) == expected
