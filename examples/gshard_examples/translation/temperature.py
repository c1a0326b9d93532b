"""The temperature that evens languages out."""

from __future__ import annotations

from collections.abc import Mapping


def temperature_shares(
    counts: Mapping[str, int], temperature: float
) -> dict[str, float]:
    """Returns the share of each language when sampling with a temperature.

    The share is proportional to `count ** (1 / temperature)`: 1 samples as the data
    are, larger values lift the small languages (5 is usual for a hundred languages),
    infinity makes all equal.

    Raises:
        ValueError: `temperature` is below 1, or there is nothing to count.
    """
    if not temperature >= 1.0:
        raise ValueError(
            "temperature must be 1 (as the data are) or more. Received: "
            f"temperature={temperature}"
        )
    if not counts or min(counts.values()) < 1:
        raise ValueError(f"every language needs a pair. Received: counts={counts}")
    weights = {tag: count ** (1.0 / temperature) for tag, count in counts.items()}
    total = sum(weights.values())
    return {tag: weight / total for tag, weight in weights.items()}
