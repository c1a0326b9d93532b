"""Which array of a checkpoint goes into which variable, and what is left over."""

import dataclasses
import re
from collections.abc import Mapping, Sequence

from gshard_tf.checkpoints.errors import CheckpointMismatchError
from gshard_tf.checkpoints.manifest import Array
from gshard_tf.checkpoints.naming import section


@dataclasses.dataclass(frozen=True)
class Match:
    """What a restore does.

    Attributes:
        sources: The array for each variable that gets one.
        repeated: The variables whose array lacks their first dimension (that of the
            experts, say) and is repeated along it.
        missing: Variables that the checkpoint has nothing for; they stay as they are.
        extra: Arrays that no variable takes.
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
        arrays: What the checkpoint has.
        rename: `(pattern, source)` pairs: a variable whose whole name matches the
            regular expression takes the array `source` (which may say `\\1` and so on).
        missing: Patterns for variables that the checkpoint need not have.
        extra: Patterns for arrays that need not be taken. Metrics are always allowed to
            be missing and extra: they depend on how the model was compiled.

    Raises:
        CheckpointMismatchError: lists everything that does not fit.
    """
    sources: dict[str, str] = {}
    repeated, absent, wrong, taken = set(), [], [], set()
    for name, (shape, dtype) in targets.items():
        source = name
        for pattern, template in rename:
            if found := re.fullmatch(pattern, name):
                source = found.expand(template)
                break
        if source not in arrays:
            absent.append(name)
            continue
        taken.add(source)
        array = arrays[source]
        if array.shape != shape and source != name and array.shape == shape[1:]:
            repeated.add(name)
        elif array.shape != shape:
            wrong.append(f"{name} has shape {shape}, the checkpoint's {array.shape}")
            continue
        if array.dtype != dtype:
            wrong.append(f"{name} is {dtype}, the checkpoint's {array.dtype}")
            continue
        sources[name] = source
    left = [name for name in arrays if name not in taken]
    lines = [f"not in the checkpoint: {n}" for n in _not_allowed(absent, missing)]
    lines += [f"of another kind: {line}" for line in wrong]
    lines += [f"not in the model: {name}" for name in _not_allowed(left, extra)]
    if lines:
        shown = lines[:20] + ([f"and {len(lines) - 20} more"] if lines[20:] else [])
        raise CheckpointMismatchError(
            "The checkpoint is not one of this model (name what may differ with "
            "rename=, missing= and extra=):\n  " + "\n  ".join(shown)
        )
    return Match(sources, frozenset(repeated), tuple(absent), tuple(left))


def _not_allowed(names: Sequence[str], patterns: Sequence[str]) -> list[str]:
    return [
        name
        for name in names
        if section(name) != "metrics"
        and not any(re.fullmatch(pattern, name) for pattern in patterns)
    ]
