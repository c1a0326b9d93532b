"""How far two runs of a step may lie apart, and how far they do."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from gshard_tf.compat.xla_protos import HloModuleProto, xla_data_pb2

# How far equal computations may lie apart in the narrowest floating type of a step,
# relative to the largest number of each array, and its distance from 1 to the next
# number. 1e-4 is hundreds of float32's roundings, yet far below what a lost or doubled
# shard does; half precision has room for about a dozen roundings only.
_PRECISIONS = {
    xla_data_pb2.BF16: (1e-1, 2.0**-7),
    xla_data_pb2.F16: (2e-2, 2.0**-10),
    xla_data_pb2.F32: (1e-4, 2.0**-23),
    xla_data_pb2.F64: (1e-9, 2.0**-52),
}
# A difference this many times what rounding the weights does is no rounding. Where
# rounding decides most of a value, one run is no measure of another, squares of it (the
# second moment of a gradient that should be 0) still less; but what is no rounding is
# larger by many orders.
_MARGIN = 8.0
_MARGIN_OF_NOISE = 1e4
_NOISE = 0.25
# Storing a new value rounds it, on either side.
_ROUNDINGS = 4.0
_PERTURBATIONS = 3


@dataclasses.dataclass(frozen=True)
class Measure:
    """The largest difference of two arrays.

    Attributes:
        difference: Relative to the largest number of the reference; infinity where
            that is 0, or where one side alone has NaN or infinity.
        allowed: How large it may be.
        ratio: By which factor the array is the reference, on the whole (least
            squares), or None where the reference is 0 or not finite.
        where: The index of the largest difference.
        not_finite: How many numbers are NaN or infinite: here, and in the reference.
        moved: Whether the reference is anything but 0 everywhere.
    """

    difference: float
    allowed: float
    ratio: float | None
    where: tuple[int, ...]
    not_finite: tuple[int, int]
    moved: bool

    @property
    def ok(self) -> bool:
        return self.difference <= self.allowed


def precision(proto: HloModuleProto) -> tuple[float, float]:
    """The tolerance, and the rounding, of the narrowest floating type of a module."""
    found = {
        shape.element_type
        for computation in proto.computations
        for instruction in computation.instructions
        for shape in [instruction.shape, *instruction.shape.tuple_shapes]
    }
    # In the order of the table: the first is the narrowest.
    return next(
        (value for key, value in _PRECISIONS.items() if key in found),
        _PRECISIONS[xla_data_pb2.F32],
    )


def is_floating(array: np.ndarray) -> bool:
    """Whether an array has real or complex floating numbers, bfloat16 included."""
    # numpy sees bfloat16 as a type of its own kind, "V".
    return array.dtype.kind in "fcV"


def perturbed(
    captures: Sequence[np.ndarray], which: Sequence[bool], rounding: float
) -> list[list[np.ndarray]]:
    """The state of a step, rounded differently: once for each run of the step.

    How much of a result rounding decides cannot be told from the result. A bias before
    a normalisation has a gradient of nothing but rounding, Adam makes whole steps of
    it, and a router turns it into another expert. So the step is run again with each
    of the captures that `which` says moved by its last digit, at random, and what that
    changes is what no comparison can see.

    Args:
        captures: The values of all captures.
        which: Which of them to change.
        rounding: By how much, relative to each number.
    """
    rng = np.random.default_rng(0)
    found = []
    for _ in range(_PERTURBATIONS if any(which) else 0):
        values = []
        for value, chosen in zip(captures, which, strict=True):
            if chosen:
                # Rounding to the nearest is off by half of a digit at most.
                sign = rng.integers(0, 2, value.shape) - 0.5
                moved = value.astype(_wide(value)) * (1 + rounding * sign)
                value = moved.astype(value.dtype)
            values.append(value)
        found.append(values)
    return found


def change(new: np.ndarray, old: np.ndarray | None) -> np.ndarray:
    """What is compared: what a step added to a variable, or a result as it is.

    A step adds little to a weight, so a new weight is right to many digits whatever
    was added.
    """
    new = np.asarray(new)
    if old is None or not is_floating(new):
        return new.astype(_wide(new)) if new.dtype.kind != "b" else new.astype(float)
    with np.errstate(invalid="ignore"):  # infinity less infinity
        moved = new.astype(_wide(new)) - old.astype(_wide(old))
    # What has become NaN or infinite shall be seen as that.
    return np.where(np.isfinite(new.astype(_wide(new))), moved, new.astype(_wide(new)))


def noise(
    new: Sequence[np.ndarray], old: Sequence[np.ndarray | None], base: np.ndarray
) -> float:
    """The largest difference that rounding the weights makes to one value.

    Args:
        new: The value in each of the runs with other weights.
        old: Before each of them, for a variable.
        base: `change` of the run with the weights as they are.
    """
    found = 0.0
    for after, before in zip(new, old, strict=True):
        found = max(found, _largest(_apart(change(after, before), base)[0]))
    return found


def measure(
    found: np.ndarray,
    expected: np.ndarray,
    old: np.ndarray | None,
    tolerance: float,
    rounding_noise: float,
) -> Measure:
    """Compares one value of two runs.

    Args:
        found: Of the run that is in question.
        expected: Of the reference.
        old: What it was before, for a variable that the step updates.
        tolerance: Relative to the largest number of the reference's change.
        rounding_noise: From `noise`.
    """
    ours, theirs = change(found, old), change(expected, old)
    apart, one_sided = _apart(ours, theirs)
    largest = _largest(np.where(np.isfinite(theirs), np.abs(theirs), 0))
    is_noise = rounding_noise > _NOISE * largest
    allowed = rounding_noise * (_MARGIN_OF_NOISE if is_noise else _MARGIN)
    if is_floating(np.asarray(expected)):
        allowed += tolerance * largest
        if old is not None:
            wide = np.asarray(expected).astype(_wide(expected))
            size = _largest(np.where(np.isfinite(wide), np.abs(wide), 0))
            allowed += _ROUNDINGS * _rounding(np.asarray(expected)) * size
    difference = np.inf if one_sided else _largest(apart)
    return Measure(
        _relative(difference, largest),
        _relative(allowed, largest),
        _ratio(ours, theirs),
        tuple(int(i) for i in np.unravel_index(np.argmax(apart), apart.shape))
        if apart.size
        else (),
        (
            int(np.count_nonzero(~np.isfinite(ours))),
            int(np.count_nonzero(~np.isfinite(theirs))),
        ),
        bool(np.any(theirs != 0)),
    )


def _apart(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, bool]:
    """How far two arrays lie apart; whether one alone is not finite somewhere."""
    same = (a == b) | (np.isnan(a) & np.isnan(b))
    with np.errstate(invalid="ignore"):
        apart = np.where(same, 0.0, np.abs(a - b))
    lone = ~np.isfinite(apart)
    return np.where(lone, np.inf, apart), bool(np.any(lone))


def _relative(difference: float, largest: float) -> float:
    if difference == 0:
        return 0.0
    return difference / largest if largest else float("inf")


def _ratio(ours: np.ndarray, theirs: np.ndarray) -> float | None:
    finite = np.isfinite(ours) & np.isfinite(theirs)
    ours, theirs = ours[finite], theirs[finite]
    power = float(np.sum(np.abs(theirs) ** 2))
    if power == 0:
        return None
    return float(np.real(np.sum(ours * np.conj(theirs)))) / power


def _largest(values: np.ndarray) -> float:
    return float(np.max(values)) if values.size else 0.0


def _wide(array: Any) -> type:
    return np.complex128 if np.asarray(array).dtype.kind == "c" else np.float64


def _rounding(array: np.ndarray) -> float:
    if array.dtype.kind == "V" or array.dtype.name == "bfloat16":
        return 2.0**-7
    return float(np.finfo(array.dtype).eps)
