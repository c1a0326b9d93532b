"""Values of a command's flags from a TOML file, which `--config` names."""

from __future__ import annotations

import argparse
import tomllib
from pathlib import Path
from typing import Any


def read_config(path: Path) -> dict[str, Any]:
    """Returns the values of a file by the flags' names, `steps_per_epoch` with `-`.

    Raises:
        ValueError: The file is no TOML, or names a flag twice.
        OSError: It cannot be read.
    """
    try:
        values = tomllib.loads(path.read_text("utf-8"))
    except ValueError as error:  # of TOML, or of UTF-8
        raise ValueError(f"{path} must be a TOML file: {error}") from error
    result: dict[str, Any] = {}
    for key, value in values.items():
        name = key.replace("_", "-")
        if name in result:
            raise ValueError(f"{path} must have each flag once. Received: {name} twice")
        result[name] = value
    return result


def flag_name(action: argparse.Action) -> str | None:
    """Returns a flag's name in a file, `steps-per-epoch`; None for what has none there.

    Positional arguments have none, nor have flags that end the command, as `--help`.
    """
    if action.dest in (argparse.SUPPRESS, "help", "version", "config"):
        return None
    long = [name[2:] for name in action.option_strings if name.startswith("--")]
    return long[0] if long else None


def flag_value(action: argparse.Action, value: Any) -> Any:
    """Returns a file's value as the flag would have parsed it.

    Args:
        action: The flag.
        value: A truth value for a flag without an argument, a list for one with
            several, else a number or a string.

    Raises:
        ValueError: The flag takes no such value.
    """
    if action.nargs == 0:
        if not isinstance(value, bool):
            raise _refused(action, "true or false", value)
        return value
    several = action.nargs is not None or isinstance(action.default, list)
    if not several:
        return _parsed(action, value)
    if not isinstance(value, list) or not value:
        raise _refused(action, "a list", value)
    if isinstance(action.nargs, int) and len(value) != action.nargs:
        raise _refused(action, f"a list of {action.nargs}", value)
    return [_parsed(action, each) for each in value]


def _parsed(action: argparse.Action, value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise _refused(action, "a string or a number", value)
    parse = action.type
    try:
        result = parse(str(value)) if callable(parse) else str(value)
    except argparse.ArgumentTypeError as error:
        raise ValueError(f"{flag_name(action)}: {error}") from error
    except (TypeError, ValueError) as error:
        kind = getattr(parse, "__name__", "valid")
        raise _refused(action, f"a {kind} value", value) from error
    if action.choices is not None and result not in action.choices:
        raise _refused(action, f"one of {', '.join(map(str, action.choices))}", value)
    return result


def _refused(action: argparse.Action, must: str, value: Any) -> ValueError:
    return ValueError(f"{flag_name(action)} must be {must}. Received: {value!r}")
