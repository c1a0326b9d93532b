"""Times of sides that take turns, so that a slow minute is slow for all of them."""

import gc
import statistics
import time
from collections.abc import Callable, Mapping


def alternate(
    sides: Mapping[str, Callable[[], object]], rounds: int, warm_up: int = 1
) -> dict[str, list[float]]:
    """Seconds of each side in each round.

    Args:
        sides: What to time. Each call returns when its work is done.
        rounds: How often each side runs. Every other round goes through the sides
            backwards, so that none always follows the same neighbor.
        warm_up: Calls of each side that are not timed: the first one compiles.
    """
    if rounds < 1:
        raise ValueError(f"rounds is at least 1. Received: rounds={rounds}")
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(warm_up):
        for call in sides.values():
            call()
    gc.collect()
    for i in range(rounds):
        names = list(sides)
        for name in reversed(names) if i % 2 else names:
            start = time.perf_counter()
            sides[name]()
            times[name].append(time.perf_counter() - start)
    return times


def ratio(times: Mapping[str, list[float]], numerator: str, denominator: str) -> float:
    """The median of the rounds' ratios."""
    pairs = zip(times[numerator], times[denominator], strict=True)
    return statistics.median(a / b for a, b in pairs)


def median(times: Mapping[str, list[float]], name: str) -> float:
    """The median seconds of a side."""
    return statistics.median(times[name])
