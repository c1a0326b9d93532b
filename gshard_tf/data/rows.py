"""Packing: which examples share a row, and the rows themselves, with NumPy alone.

A row of fixed length holds several examples one after the other. Segment ids tell them
apart: 1, 2, ... in each row, 0 on padding.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

LOOKAHEAD = 1024
# Windows that are planned at once: their free lengths stay in a core's cache.
_WINDOWS_AT_ONCE = 256


@dataclass(frozen=True)
class RowPlan:
    """The examples of each row.

    Attributes:
        examples: int64 `[n]` numbers of examples, row after row.
        starts: int64 `[rows + 1]` where each row starts in `examples`.
        too_long: The number of examples that fit in no row and are in none.
    """

    examples: np.ndarray
    starts: np.ndarray
    too_long: int = 0

    def __len__(self) -> int:
        """Returns the number of rows."""
        return len(self.starts) - 1

    def row(self, number: int) -> np.ndarray:
        """Returns the numbers of the examples of one row, in their order."""
        return self.examples[self.starts[number] : self.starts[number + 1]]

    def select(self, rows: np.ndarray) -> "RowPlan":
        """Returns the plan of some rows, in the order given.

        Args:
            rows: Integers `[r]`, numbers of rows.
        """
        counts = np.diff(self.starts)[rows]
        starts = np.concatenate([[0], np.cumsum(counts)])
        return RowPlan(self.examples[_ranges(self.starts[:-1][rows], counts)], starts)

    def fill(self, lengths: np.ndarray, row_lengths: Sequence[int]) -> np.ndarray:
        """Returns the share of the positions that hold ids, float64 `[features]`.

        Args:
            lengths: Integers `[examples, features]`, as for `plan_rows`.
            row_lengths: The length of a row, for each feature.
        """
        used = np.asarray(lengths)[self.examples].sum(axis=0)
        return used / (max(len(self), 1) * np.asarray(row_lengths))


def plan_rows(
    lengths: np.ndarray,
    row_lengths: Sequence[int],
    lookahead: int = LOOKAHEAD,
    too_long: str = "raise",
) -> RowPlan:
    """Decides which examples share a row.

    Each `lookahead` consecutive examples are a window, which is packed alone: longest
    example first, into the first row where all of its features fit (first-fit
    decreasing; Johnson, "Near-optimal bin packing algorithms", 1973. Length is the sum
    over features of the share of a row). So the rows of a window are a function of
    its examples' lengths and of nothing else, and the rows of a stream are those of its
    windows, one after the other. Within a row, examples are in the order they came in;
    within a window, rows are in the order of their first example.

    500,000 examples of two features take about a second.

    Args:
        lengths: Integers `[examples, features]`, 1 or more: ids of each feature. An
            example is in one row with all of its features.
        row_lengths: The length of a row, for each feature. Features fill alike when
            the row lengths have the ratio of the mean lengths.
        lookahead: The number of examples of a window. The last rows of a window stay
            partly empty, so a window should hold enough for 50 rows and more.
        too_long: What to do with examples of which a feature is longer than a row:
            "raise", or "drop", which counts them in the plan's `too_long`.

    Raises:
        ValueError: An option is wrong, a length is below 1, or an example is longer
            than a row and `too_long` is "raise".
    """
    lengths = np.asarray(lengths)
    limits = np.asarray(row_lengths)
    check_options(limits, lookahead, too_long)
    if lengths.ndim != 2 or lengths.shape[1] != len(limits):
        raise ValueError(
            "`lengths` must be [examples, features], with a row length for each "
            f"feature. Received: lengths of shape {lengths.shape}, "
            f"row_lengths={limits.tolist()}"
        )
    if not np.issubdtype(lengths.dtype, np.integer) or (lengths < 1).any():
        raise ValueError(
            "`lengths` must be integers of 1 or more: attention over no position has "
            f"no value. Received: dtype {lengths.dtype}, smallest "
            f"{lengths.min(initial=1)}"
        )
    fits: np.ndarray = np.all(lengths <= limits, axis=1)
    if too_long == "raise" and not fits.all():
        first = int(np.argmin(fits))
        raise ValueError(
            "`lengths` must be at most the row lengths; too_long='drop' leaves out "
            f"longer examples. Received: {int((~fits).sum())} longer ones, the first "
            f"of them example {first} of lengths {lengths[first].tolist()}, "
            f"row_lengths={limits.tolist()}"
        )
    examples = np.flatnonzero(fits)
    rows = _row_of_each(np.where(fits[:, np.newaxis], lengths, 0), limits, lookahead)
    # Rows by their first example: `index` is that of the first, as they ascend.
    _, index, row = np.unique(rows[examples], return_index=True, return_inverse=True)
    rank = np.empty(len(index), np.int64)
    rank[np.argsort(index)] = np.arange(len(index))
    row = rank[row]
    starts = np.concatenate([[0], np.cumsum(np.bincount(row, minlength=len(index)))])
    return RowPlan(examples[np.argsort(row, kind="stable")], starts, int((~fits).sum()))


def check_options(limits: np.ndarray, lookahead: int, too_long: str) -> None:
    """Checks the options that all packing has.

    Raises:
        ValueError: One is wrong.
    """
    if limits.ndim != 1 or not limits.size or (limits < 1).any():
        raise ValueError(
            "`row_lengths` must be a length of 1 or more for each feature. Received: "
            f"row_lengths={limits.tolist()}"
        )
    if lookahead < 1:
        raise ValueError(
            f"`lookahead` must be 1 or more. Received: lookahead={lookahead}"
        )
    if too_long not in ("raise", "drop"):
        raise ValueError(
            f"`too_long` must be 'raise' or 'drop'. Received: too_long={too_long!r}"
        )


def _row_of_each(lengths: np.ndarray, limits: np.ndarray, lookahead: int) -> np.ndarray:
    """Returns a number for the row of each example `[n]`; examples of 0 get any."""
    count, features = lengths.shape
    windows = -(-count // lookahead)
    padded = np.zeros((windows * lookahead, features), lengths.dtype)
    padded[:count] = lengths
    padded = padded.reshape(windows, lookahead, features)
    rows = np.empty((windows, lookahead), np.int64)
    for start in range(0, windows, _WINDOWS_AT_ONCE):
        block = slice(start, start + _WINDOWS_AT_ONCE)
        rows[block] = _first_fit_decreasing(padded[block], limits)
    # A window has at most as many rows as examples.
    rows += np.arange(windows)[:, np.newaxis] * lookahead
    return rows.reshape(-1)[:count]


def _first_fit_decreasing(lengths: np.ndarray, limits: np.ndarray) -> np.ndarray:
    """Returns the row `[W, K]` of each of K examples, in W windows side by side.

    Args:
        lengths: `[W, K, F]`, none longer than its limit.
        limits: `[F]`.
    """
    windows, count, features = lengths.shape
    size = np.zeros((windows, count))
    for feature in range(features):  # one by one: no reduction whose order may vary
        size += lengths[..., feature] / limits[feature]
    order = np.argsort(-size, axis=1, kind="stable")  # [W, K]
    # Narrow numbers: comparing them is what takes the time.
    dtype = np.min_scalar_type(-int(limits.max()) - 1)
    # [F, K, W, 1], as the loop reads them.
    items = np.take_along_axis(lengths, order[..., np.newaxis], axis=1)
    items = np.ascontiguousarray(items.transpose(2, 1, 0)[..., np.newaxis], dtype)
    capacity = limits.astype(dtype)[:, np.newaxis, np.newaxis]  # [F, 1, 1]
    free = np.tile(capacity, (1, windows, 16))  # [F, W, rows]
    rows = np.empty((count, windows), np.int64)
    here = np.arange(windows)
    used = 1  # rows that some window has begun, and one more, where everything fits
    for i in range(count):
        fits = free[0, :, :used] >= items[0, i]  # [W, rows]
        for feature in range(1, features):
            fits &= free[feature, :, :used] >= items[feature, i]
        row = fits.argmax(axis=1)  # the first one
        rows[i] = row
        for feature in range(features):
            free[feature, here, row] -= items[feature, i, :, 0]
        if int(row.max()) + 1 == used:
            used += 1
            if used > free.shape[2]:
                more = np.tile(capacity, (1, windows, used // 2))
                free = np.concatenate([free, more], axis=2)
    back = np.empty((windows, count), np.int64)
    np.put_along_axis(back, order, rows.T, axis=1)
    return back


def lay_out(
    plan: RowPlan,
    values: np.ndarray,
    starts: np.ndarray,
    lengths: np.ndarray,
    row_length: int,
    pad: int = 0,
) -> tuple[np.ndarray, np.ndarray]:
    """Lays out one feature in rows.

    Args:
        plan: The examples of each row.
        values: `[...]` the feature of all examples, one after the other.
        starts: Integers `[examples]`: where each example starts in `values`.
        lengths: Integers `[examples]`: how many of the values are the example's.
        row_length: L, the length of a row.
        pad: The value of padding.

    Returns:
        The rows `[rows, L]` of the dtype of `values`, and their segment ids, int32
        `[rows, L]`: 1, 2, ... in each row, 0 on padding.

    Raises:
        ValueError: The examples of a row are longer than `row_length`.
    """
    rows = len(plan)
    counts = np.diff(plan.starts)
    row = np.repeat(np.arange(rows), counts)  # of each example
    segment = np.arange(len(row)) - np.repeat(plan.starts[:-1], counts) + 1
    lengths = np.asarray(lengths)[plan.examples]
    ends = np.concatenate([[0], np.cumsum(lengths)])
    ends_of_rows = ends[plan.starts]
    longest = int(np.diff(ends_of_rows).max(initial=0))
    if longest > row_length:
        raise ValueError(
            "`row_length` must be that of the longest row of the plan or more. "
            f"Received: row_length={row_length}, a row of {longest}"
        )
    # Where each example starts in the rows, as if they were one array.
    offsets = row * row_length + ends[:-1] - ends_of_rows[row]
    where = _ranges(offsets, lengths)
    values = np.asarray(values)
    out = np.full(rows * row_length, pad, values.dtype)
    out[where] = values[_ranges(np.asarray(starts)[plan.examples], lengths)]
    segments = np.zeros(rows * row_length, np.int32)
    segments[where] = np.repeat(segment, lengths)
    shape = (rows, row_length)
    return out.reshape(shape), segments.reshape(shape)


def _ranges(starts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Returns `start, start + 1, ...` of `count` numbers each, one after the other."""
    before = np.cumsum(counts) - counts
    return np.repeat(starts - before, counts) + np.arange(int(counts.sum()))
