"""Argument checks that the layers share: each raises before any work is done."""

from collections.abc import Sequence
from typing import Any


def check_int(name: str, value: Any, least: int) -> None:
    """Raises ValueError unless `value` is a whole number of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(
            f"{name} must be a whole number, at least {least}. "
            f"Received: {name}={value!r}"
        )


def check_positive(name: str, value: Any) -> None:
    """Raises ValueError unless `value` is a number above 0."""
    if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
        raise ValueError(f"{name} must be above 0. Received: {name}={value!r}")


def check_coefficient(name: str, value: Any) -> None:
    """Raises ValueError unless `value` is a number, at least 0."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not value >= 0:
        raise ValueError(
            f"{name} must be a number, at least 0. Received: {name}={value!r}"
        )


def check_rate(name: str, value: Any) -> None:
    """Raises ValueError unless `value` is a number in [0, 1)."""
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float)
        or not 0 <= value < 1
    ):
        raise ValueError(f"{name} must lie in [0, 1). Received: {name}={value!r}")


def check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    """Raises ValueError unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(
            f"{name} must be one of {list(choices)}. Received: {name}={value!r}"
        )
