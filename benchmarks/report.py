"""What the benchmark scripts say besides their figures."""

import os
import sys
import time
from typing import Any

from benchmarks import machine


def say(text: str) -> None:
    """Progress, beside the one JSON object on standard output."""
    print(text, file=sys.stderr, flush=True)


def circumstances(begun: float, quick: bool) -> dict[str, Any]:
    """Where and how a run went that began at `begun`, of `time.perf_counter`."""
    return {
        "quick": quick,
        "load_average": os.getloadavg()[0],
        "seconds_in_all": round(time.perf_counter() - begun),
        "machine": machine.describe(),
    }
