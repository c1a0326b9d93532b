"""Packing, compared with a slow packer of lists and with next-fit."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gshard_tf.data import lay_out, plan_rows


@st.composite
def cases(draw):
    """Row lengths, and lengths of examples of which some may not fit."""
    features = draw(st.integers(1, 3))
    limits = draw(st.lists(st.integers(1, 12), min_size=features, max_size=features))
    example = st.tuples(*(st.integers(1, limit + 1) for limit in limits))
    lengths = draw(st.lists(example, max_size=60))
    lookahead = draw(st.integers(1, 70))
    return np.array(lengths, np.int64).reshape(-1, features), limits, lookahead


def obvious_rows(lengths, limits, lookahead):
    """First-fit decreasing in each window, with lists."""
    rows = []
    for start in range(0, len(lengths), lookahead):
        window = range(start, min(start + lookahead, len(lengths)))
        fitting = [i for i in window if all(lengths[i] <= limits)]
        sizes = {
            i: sum(a / b for a, b in zip(lengths[i].tolist(), limits, strict=True))
            for i in fitting
        }
        packed = []
        for i in sorted(fitting, key=lambda i: (-sizes[i], i)):  # noqa: B023
            for row in packed:
                if all(lengths[[*row, i]].sum(axis=0) <= limits):
                    row.append(i)
                    break
            else:
                packed.append([i])
        rows += sorted(sorted(row) for row in packed)
    return rows


def next_fit(lengths, limits):
    """The number of rows when each example goes into the last row or a new one."""
    rows, used = 1, np.zeros(len(limits), int)
    for length in lengths:
        if (used + length > limits).any():
            rows, used = rows + 1, length
        else:
            used = used + length
    return rows


@given(cases())
@settings(deadline=None, max_examples=300)
def test_the_rows_are_those_of_the_obvious_packer(case):
    lengths, limits, lookahead = case
    plan = plan_rows(lengths, limits, lookahead, too_long="drop")
    rows = [plan.row(number).tolist() for number in range(len(plan))]
    assert rows == obvious_rows(lengths, np.array(limits), lookahead)


@given(cases())
@settings(deadline=None, max_examples=200)
def test_every_example_once_and_no_row_overfull(case):
    lengths, limits, lookahead = case
    plan = plan_rows(lengths, limits, lookahead, too_long="drop")
    fitting = np.flatnonzero((lengths <= limits).all(axis=1))
    assert sorted(plan.examples) == fitting.tolist()
    assert plan.too_long == len(lengths) - len(fitting)
    for number in range(len(plan)):
        row = plan.row(number)
        assert len(row) and (np.diff(row) > 0).all()
        assert (lengths[row].sum(axis=0) <= limits).all()
        # All of one window.
        assert row[0] // lookahead == row[-1] // lookahead
    if len(plan):
        fill = lengths[fitting].sum(axis=0) / (len(plan) * np.array(limits))
        np.testing.assert_allclose(plan.fill(lengths, limits), fill)


@given(cases())
@settings(deadline=None, max_examples=100)
def test_a_stream_is_its_windows(case):
    """So the rows of a position do not depend on how much is planned at once."""
    lengths, limits, lookahead = case
    whole = plan_rows(lengths, limits, lookahead, too_long="drop")
    rows = []
    for start in range(0, len(lengths), lookahead):
        window = lengths[start : start + lookahead]
        plan = plan_rows(window, limits, lookahead, too_long="drop")
        rows += [(plan.row(i) + start).tolist() for i in range(len(plan))]
    assert rows == [whole.row(i).tolist() for i in range(len(whole))]


def test_many_windows_are_planned_as_one_alone():
    """More than are planned side by side, and rows added in the middle."""
    draw = np.random.default_rng(0)
    lengths = draw.integers(1, 30, (3000, 2))
    plan = plan_rows(lengths, (32, 31), 7)
    rows = [plan.row(i).tolist() for i in range(len(plan))]
    assert rows == obvious_rows(lengths, np.array((32, 31)), 7)
    # Half of each row at least: as many rows as examples.
    plan = plan_rows(np.full((100, 1), 17), (32,), 100)
    assert [plan.row(i).tolist() for i in range(len(plan))] == [[i] for i in range(100)]


def like_sentences(seed, count=6000):
    """Lengths of which most are short and few long, the two sides correlated."""
    draw = np.random.default_rng(seed)
    source = np.exp(draw.normal(2.1, 0.65, count))
    target = source * np.exp(draw.normal(-0.45, 0.3, count))
    return np.clip(np.stack([source, target], axis=1).astype(int), 2, (64, 40))


@pytest.mark.parametrize("seed", range(3))
def test_both_features_are_filled(seed):
    lengths = like_sentences(seed)
    mean = lengths.mean(axis=0)
    limits = (64, round(64 * mean[1] / mean[0]))
    lengths = np.minimum(lengths, limits)
    plan = plan_rows(lengths, limits)
    assert plan.fill(lengths, limits).min() >= 0.92
    rows = next_fit(lengths, limits)
    assert len(plan) < 0.95 * rows


@given(
    st.integers(0, 2**32 - 1), st.integers(20, 100), st.integers(20, 100), st.booleans()
)
@settings(deadline=None, max_examples=60)
def test_no_more_rows_than_next_fit(seed, first, second, even):
    """Not a theorem (a lucky order may suit next-fit), but so in any random order."""
    limits = np.array((first, second))
    if even:
        lengths = np.random.default_rng(seed).integers(1, limits // 2 + 1, (400, 2))
    else:
        lengths = np.minimum(like_sentences(seed, 400), limits)
    assert len(plan_rows(lengths, limits, 400)) <= next_fit(lengths, limits)


@given(cases(), st.integers(0, 3))
@settings(deadline=None, max_examples=200)
def test_rows_laid_out(case, pad):
    lengths, limits, lookahead = case
    plan = plan_rows(lengths, limits, lookahead, too_long="drop")
    for feature, limit in enumerate(limits):
        length = lengths[:, feature]
        starts = np.cumsum(length) - length
        values = np.arange(length.sum(), dtype=np.int64) + 10
        rows, segments = lay_out(plan, values, starts, length, limit, pad)
        assert rows.shape == segments.shape == (len(plan), limit)
        assert (rows.dtype, segments.dtype) == (np.int64, np.int32)
        for number in range(len(plan)):
            ids, numbers = [], []
            for k, example in enumerate(plan.row(number), 1):
                ids += range(
                    starts[example] + 10, starts[example] + length[example] + 10
                )
                numbers += [k] * length[example]
            rest = limit - len(ids)
            assert rows[number].tolist() == ids + [pad] * rest
            assert segments[number].tolist() == numbers + [0] * rest


def test_rows_selected():
    lengths = np.array([[3], [3], [1], [2], [4]])
    plan = plan_rows(lengths, [4])
    assert [plan.row(i).tolist() for i in range(len(plan))] == [[0, 2], [1], [3], [4]]
    some = plan.select(np.array([3, 0, 0]))
    assert [some.row(i).tolist() for i in range(len(some))] == [[4], [0, 2], [0, 2]]
    assert len(plan.select(np.array([], int))) == 0


def test_no_examples():
    plan = plan_rows(np.zeros((0, 2), int), (4, 4))
    assert len(plan) == plan.too_long == 0
    rows, segments = lay_out(
        plan, np.zeros(0, int), np.zeros(0, int), np.zeros(0, int), 4
    )
    assert rows.shape == segments.shape == (0, 4)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (([[1, 2]], (4,)), r"shape \(1, 2\), row_lengths=\[4\]"),
        (([1, 2], (4,)), r"shape \(2,\)"),
        (([[1.0]], (4,)), "dtype float64"),
        (([[0]], (4,)), "smallest 0"),
        (([[1], [5], [6]], (4,)), r"2 longer ones, .* example 1 of lengths \[5\]"),
        (([[1]], ()), r"row_lengths=\[\]"),
        (([[1]], (0,)), r"row_lengths=\[0\]"),
        (([[1]], (4,), 0), "lookahead=0"),
        (([[1]], (4,), 8, "cut"), "too_long='cut'"),
    ],
)
def test_bad_arguments(arguments, match):
    lengths, *rest = arguments
    with pytest.raises(ValueError, match=match):
        plan_rows(np.array(lengths), *rest)


def test_a_row_that_is_too_short_for_the_plan():
    plan = plan_rows(np.array([[3], [1]]), [4])
    with pytest.raises(ValueError, match="row_length=3, a row of 4"):
        lay_out(plan, np.arange(4), np.array([0, 3]), np.array([3, 1]), 3)
