"""How the difference of two runs is measured."""

import numpy as np
import pytest
import tensorflow as tf

from gshard_tf.verification import tolerances


def measured(found, expected, old=None, noise=0.0, tolerance=1e-4, dtype="float32"):
    found, expected = np.array(found, dtype), np.array(expected, dtype)
    old = None if old is None else np.array(old, dtype)
    return tolerances.measure(found, expected, old, tolerance, noise)


def test_the_measure_of_a_difference():
    assert measured([3.0, 6.0], [1.0, 2.0]).ratio == 3.0
    assert measured([3.0, 6.0], [1.0, 2.0]).difference == 2.0
    assert measured([3.0, 6.0], [1.0, 2.0]).where == (1,)
    assert measured([1.0, 2.0001], [1.0, 2.0]).ok
    assert not measured([1.0, 2.0004], [1.0, 2.0]).ok
    # An added 1e-5 is seen beside a weight of 1, to the digits that float32 has.
    assert not measured([1.00003], [1.00001], old=[1.0]).ok
    assert measured([1.0000101], [1.00001], old=[1.0]).ok
    # What rounding does is no difference.
    assert measured([1e-9], [-1e-9], noise=1e-9).ok
    assert not measured([1e-9], [-1e-9]).ok
    assert measured([1.0, 1.01], [1.0, 1.0], noise=1e-2).ok
    assert not measured([1.0, 1.1], [1.0, 1.0], noise=1e-2).ok
    # A square of noise, from another sum of it; and what is no noise.
    assert measured([9e-17], [1e-18], noise=1e-18).ok
    assert not measured([1e-6], [1e-18], noise=1e-18).ok
    assert measured([0.0], [0.0]).ok
    assert measured([], []).ok
    assert measured(1.0, 1.0).where == ()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_the_measure_of_what_is_not_finite(bad):
    assert measured([bad, 1.0], [bad, 1.0]).ok
    assert measured([bad, 1.0], [bad, 1.0], old=[0.0, 0.0]).not_finite == (1, 1)
    assert not measured([bad, 1.0], [bad, 2.0]).ok
    assert measured([bad, 1.0], [1.0, 1.0]).difference == np.inf
    assert measured([1.0, 1.0], [bad, 1.0], old=[0.0, 0.0]).difference == np.inf
    assert measured([bad, 1.0], [bad, 1.0], old=[bad, 1.0]).ok


def test_the_measure_of_whole_numbers_is_exact():
    assert not measured([1000001], [1000000], dtype="int32").ok
    assert measured([2**32 - 1], [2**32 - 1], dtype="uint32").ok
    assert not measured([True, False], [True, True], dtype="bool").ok
    half = tf.bfloat16.as_numpy_dtype
    assert measured([1.0078125], [1.0], old=[1.0], dtype=half).ok
    assert not measured([1.5], [1.0], old=[0.0], dtype=half).ok
    assert not measured([1 + 2j], [1 + 1j], dtype="complex64").ok
