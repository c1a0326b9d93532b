"""Argument checks that the layers share: each raises before any work is done.

Each returns the value as a Python number: sizes often come from NumPy, whose numbers
are valid neither in a config nor everywhere in TensorFlow.
"""

import numbers
from collections.abc import Sequence
from typing import Any


def check_int(name: str, value: Any, least: int) -> int:
    """Raises ValueError unless `value` is a whole number of at least `least`."""
    whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if not whole or value < least:
        raise ValueError(
            f"{name} must be a whole number, at least {least}. "
            f"Received: {name}={value!r}"
        )
    return int(value)


def check_token_id(name: str, value: Any, vocab_size: int) -> int:
    """Raises ValueError unless `value` is an id of a vocabulary of this size."""
    value = check_int(name, value, 0)
    if value >= vocab_size:
        raise ValueError(
            f"{name} must be an id of the vocabulary, 0 to {vocab_size - 1}. "
            f"Received: {name}={value}"
        )
    return value


def check_positive(name: str, value: Any) -> int | float:
    """Raises ValueError unless `value` is a number above 0."""
    if not _is_number(value) or not value > 0:
        raise ValueError(f"{name} must be above 0. Received: {name}={value!r}")
    return _number(value)


def check_coefficient(name: str, value: Any) -> int | float:
    """Raises ValueError unless `value` is a number, at least 0."""
    if not _is_number(value) or not value >= 0:
        raise ValueError(
            f"{name} must be a number, at least 0. Received: {name}={value!r}"
        )
    return _number(value)


def check_rate(name: str, value: Any) -> int | float:
    """Raises ValueError unless `value` is a number in [0, 1)."""
    if not _is_number(value) or not 0 <= value < 1:
        raise ValueError(f"{name} must be in [0, 1). Received: {name}={value!r}")
    return _number(value)


def check_choice(name: str, value: Any, choices: Sequence[Any]) -> None:
    """Raises ValueError unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(
            f"{name} must be one of {list(choices)}. Received: {name}={value!r}"
        )


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _number(value: Any) -> int | float:
    return int(value) if isinstance(value, numbers.Integral) else float(value)
