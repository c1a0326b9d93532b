"""Differences of two runs of a step, and how large they may be."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from gshard_tf.compat.xla_protos import HloModuleProto, xla_data_pb2

# The tolerance of equal computations in the narrowest floating type of a step, relative
# to the largest number of each array, and the distance from 1 to its next number. 1e-4
# is hundreds of float32's roundings, yet far below the effect of a lost or doubled
# shard; half precision has room for about a dozen roundings only.
_PRECISIONS = {
    xla_data_pb2.BF16: (1e-1, 2.0**-7),
    xla_data_pb2.F16: (2e-2, 2.0**-10),
    xla_data_pb2.F32: (1e-4, 2.0**-23),
    xla_data_pb2.F64: (1e-9, 2.0**-52),
}
# A difference this many times the effect of rounding the weights is not rounding. If
# rounding decides most of a value, one run does not predict another, still less its
# squares (the second moment of a gradient that should be 0); but a real difference is
# larger by many orders of magnitude.
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
        ratio: The factor from the reference to the array by least squares, or None
            where the reference is 0 or not finite.
        where: The index of the largest difference.
        not_finite: The count of NaN and infinity in the array and in the reference.
        moved: Whether the reference is nonzero anywhere.
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
    """Returns tolerance and rounding of the narrowest floating type of a module."""
    types = {
        shape.element_type
        for computation in proto.computations
        for instruction in computation.instructions
        for shape in [instruction.shape, *instruction.shape.tuple_shapes]
    }
    # In the order of the table: the first is the narrowest.
    return next(
        (value for key, value in _PRECISIONS.items() if key in types),
        _PRECISIONS[xla_data_pb2.F32],
    )


def is_floating(array: np.ndarray) -> bool:
    """Returns whether an array is floating, complex and bfloat16 included."""
    # numpy sees bfloat16 as a type of its own kind, "V".
    return array.dtype.kind in "fcV"


def perturbed(
    captures: Sequence[np.ndarray], is_rounded: Sequence[bool], rounding: float
) -> list[list[np.ndarray]]:
    """Returns the state of a step, rounded differently for each of several runs.

    A result does not show how much of it rounding decides. The gradient of a bias
    before a normalization is nothing but rounding, Adam makes whole steps of it, and a
    router turns it into another expert. So the step runs again with some captures
    changed at random in their last digit, and no comparison can see differences of the
    size of the effect.

    Args:
        captures: The values of all captures.
        is_rounded: Whether to change each of them.
        rounding: The relative size of the change.
    """
    rng = np.random.default_rng(0)
    runs = []
    for _ in range(_PERTURBATIONS if any(is_rounded) else 0):
        values = []
        for value, chosen in zip(captures, is_rounded, strict=True):
            if chosen:
                # Rounding to the nearest is off by half of a digit at most.
                sign = rng.integers(0, 2, value.shape) - 0.5
                moved = value.astype(_wide(value)) * (1 + rounding * sign)
                value = moved.astype(value.dtype)
            values.append(value)
        runs.append(values)
    return runs


def change(new: np.ndarray, old: np.ndarray | None) -> np.ndarray:
    """Returns the compared value: the change of a variable, or a result itself.

    A step adds little to a weight, so most digits of a new weight are right even if
    the change is wrong.
    """
    new = np.asarray(new)
    if old is None or not is_floating(new):
        return new.astype(_wide(new)) if new.dtype.kind != "b" else new.astype(float)
    with np.errstate(invalid="ignore"):  # infinity less infinity
        moved: np.ndarray = new.astype(_wide(new)) - old.astype(_wide(old))
    # A value that has become NaN or infinite remains visible as such.
    return np.where(np.isfinite(new.astype(_wide(new))), moved, new.astype(_wide(new)))


def noise(
    new: Sequence[np.ndarray], old: Sequence[np.ndarray | None], base: np.ndarray
) -> float:
    """Returns the largest effect of rounding the weights on one value.

    Args:
        new: The value in each of the runs with changed weights.
        old: The value before each of them, for a variable.
        base: `change` of the run with unchanged weights.
    """
    largest = 0.0
    for after, before in zip(new, old, strict=True):
        largest = max(largest, _largest(_apart(change(after, before), base)[0]))
    return largest


def measure(
    result: np.ndarray,
    expected: np.ndarray,
    old: np.ndarray | None,
    tolerance: float,
    rounding_noise: float,
) -> Measure:
    """Compares one value of two runs.

    Args:
        result: The value of the run under test.
        expected: The value of the reference.
        old: The old value of a variable that the step updates.
        tolerance: The tolerance, relative to the largest number of the reference.
        rounding_noise: The result of `noise`.
    """
    ours, theirs = change(result, old), change(expected, old)
    apart, one_sided = _apart(ours, theirs)
    largest = _largest(np.where(np.isfinite(theirs), np.abs(theirs), 0))
    is_noise = rounding_noise > _NOISE * largest
    allowed = rounding_noise * (_MARGIN_OF_NOISE if is_noise else _MARGIN)
    if is_floating(np.asarray(expected)):
        allowed += tolerance * largest
        if old is not None:
            wide: np.ndarray = np.asarray(expected).astype(_wide(expected))
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
    """Returns the elementwise difference; whether only one is not finite somewhere."""
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
