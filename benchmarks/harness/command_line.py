"""Command lines and output of the benchmark scripts."""

import argparse
import json
import os
import sys
import time
from typing import Any

from benchmarks.harness import machine


def say(text: str) -> None:
    """Prints progress to standard error; standard output is for the result."""
    print(text, file=sys.stderr, flush=True)


def circumstances(start: float, quick: bool) -> dict[str, Any]:
    """Returns the circumstances of a run.

    Args:
        start: When it began, by `time.perf_counter`.
        quick: Whether it was a quick one, whose figures mean little.
    """
    return {
        "quick": quick,
        "load_average": os.getloadavg()[0],
        "seconds_in_all": round(time.perf_counter() - start),
        "machine": machine.describe(),
    }


def make_parser(
    doc: str, quick: str | None = None, seconds: float | None = None
) -> argparse.ArgumentParser:
    """Returns the parser of a script, with the flags that all scripts share.

    Args:
        doc: The script's docstring, whose first line is the description.
        quick: What `--quick` measures; None: the script has no such flag.
        seconds: The default of `--seconds`, for which each figure is measured; None:
            the script has no such flag.
    """
    parser = argparse.ArgumentParser(description=doc.split("\n", 1)[0])
    parser.add_argument("--json", action="store_true", help="print JSON")
    if quick is not None:
        parser.add_argument("--quick", action="store_true", help=quick)
    if seconds is not None:
        parser.add_argument(
            "--seconds", type=float, default=seconds, help="time for each figure"
        )
    return parser


def show(result: dict[str, Any], as_json: bool) -> None:
    """Prints figures by name, as JSON or for people."""
    if as_json:
        print(json.dumps(result), flush=True)
        return
    for key, value in result.items():
        if isinstance(value, dict):
            print(key)
            for name, figure in value.items():
                print(f"  {name:36s} {figure}")
        else:
            print(f"{key:38s} {value}")
