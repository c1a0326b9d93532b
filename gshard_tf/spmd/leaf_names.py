"""Names of the tensors of a nest, in the order in which TensorFlow flattens it."""

from collections.abc import Iterator, Mapping
from typing import Any

BATCH = ("x", "y", "sample_weight")


def named_leaves(nest: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields `(name, leaf)` of each leaf but None: `x.0`, `x.tokens`, `loss`."""
    if isinstance(nest, Mapping):
        parts = [(str(key), nest[key]) for key in sorted(nest)]
    elif isinstance(nest, tuple | list):
        parts = [(str(i), part) for i, part in enumerate(nest)]
    else:
        if nest is not None:
            yield prefix or "output", nest
        return
    for name, part in parts:
        yield from named_leaves(part, f"{prefix}.{name}" if prefix else name)


def batch_arrays(batch: Any) -> dict[str, Any]:
    """Returns the arrays of a batch, as `fit` passes it to a step, by input name.

    Args:
        batch: `x`, or a tuple `(x,)`, `(x, y)` or `(x, y, sample_weight)`, each a nest
            of arrays.

    Returns:
        Name -> array: `x`, `x.0`, `x.tokens`, `y`, `sample_weight` ...
    """
    parts = batch if isinstance(batch, tuple) else (batch,)
    if not 1 <= len(parts) <= 3:
        raise ValueError(
            "A batch must be x, (x, y) or (x, y, sample_weight). "
            f"Received: a tuple of {len(parts)}"
        )
    arrays: dict[str, Any] = {}
    for name, part in zip(BATCH, parts, strict=False):
        arrays.update(named_leaves(part, name))
    return arrays
