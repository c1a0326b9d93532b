"""Matches the variables of a model with the arrays of a checkpoint, by name."""

import dataclasses
import re
from collections.abc import Mapping, Sequence

from gshard_tf.checkpoints.errors import CheckpointMismatchError
from gshard_tf.checkpoints.manifest import Array
from gshard_tf.checkpoints.training_state import section


@dataclasses.dataclass(frozen=True)
class Match:
    """The variables and arrays that belong together.

    Attributes:
        sources: The array of each variable that gets one.
        repeated: The variables whose array lacks their first dimension (that of the
            experts, for example) and is repeated along it.
        missing: Variables without an array; they stay as they are.
        extra: Arrays without a variable.
    """

    sources: dict[str, str]
    repeated: frozenset[str]
    missing: tuple[str, ...]
    extra: tuple[str, ...]


def match(
    targets: Mapping[str, tuple[tuple[int, ...], str]],
    arrays: Mapping[str, Array],
    rename: Sequence[tuple[str, str]] = (),
    missing: Sequence[str] = (),
    extra: Sequence[str] = (),
) -> Match:
    """Pairs variables with arrays, by name.

    Args:
        targets: Shape and type of each variable.
        arrays: The arrays of the checkpoint.
        rename: `(pattern, source)` pairs: a variable whose whole name matches the
            regular expression takes the array `source` (which may say `\\1` and so on).
        missing: Patterns for variables that the checkpoint need not have.
        extra: Patterns for arrays that need not be taken. Metrics are always allowed to
            be missing and extra: they depend on how the model was compiled.

    Raises:
        CheckpointMismatchError: lists all names that do not match.
    """
    sources: dict[str, str] = {}
    repeated, absent, mismatched, taken = set(), [], [], set()
    for name, (shape, dtype) in targets.items():
        source = name
        for pattern, template in rename:
            if matched := re.fullmatch(pattern, name):
                source = matched.expand(template)
                break
        if source not in arrays:
            absent.append(name)
            continue
        taken.add(source)
        array = arrays[source]
        if array.shape != shape and source != name and array.shape == shape[1:]:
            repeated.add(name)
        elif array.shape != shape:
            mismatched.append(
                f"{name} has shape {shape}, the checkpoint's {array.shape}"
            )
            continue
        if array.dtype != dtype:
            mismatched.append(f"{name} is {dtype}, the checkpoint's {array.dtype}")
            continue
        sources[name] = source
    left = [name for name in arrays if name not in taken]
    lines = [f"not in the checkpoint: {n}" for n in _disallowed(absent, missing)]
    lines += [f"shape or dtype mismatch: {line}" for line in mismatched]
    lines += [f"not in the model: {name}" for name in _disallowed(left, extra)]
    if lines:
        shown = lines[:20] + ([f"and {len(lines) - 20} more"] if lines[20:] else [])
        raise CheckpointMismatchError(
            "The checkpoint must be one of this model (name what may differ with "
            "rename=, missing= and extra=). Received:\n  " + "\n  ".join(shown)
        )
    return Match(sources, frozenset(repeated), tuple(absent), tuple(left))


def _disallowed(names: Sequence[str], patterns: Sequence[str]) -> list[str]:
    return [
        name
        for name in names
        if section(name) != "metrics"
        and not any(re.fullmatch(pattern, name) for pattern in patterns)
    ]
