"""Random small programs, on a mesh and on one device: values and gradients.

    python -m benchmarks.partition_fuzz --minutes 10 [--seed 0] [--json]

Every operation in turn, with others around it, annotated at random places, on meshes of
one, two and three axes. What is wrong is printed as a script that shows it. The exit
status is 1 when anything is wrong, ends the process, or raises what is no refusal.
"""

import collections
import random
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.fuzz import case
from benchmarks.fuzz.crew import Crew
from benchmarks.harness.command_line import (
    circumstances,
    make_parser,
    say,
    show,
)

BAD = ("wrong", "error", "crashed")


def jobs(seed: int, only: str = "") -> Any:
    """(seed of the case, operation), without end: every operation once a round."""
    names = case.names(only)
    if not names:
        raise ValueError(f"No operation contains the text. Received: only={only!r}")
    number = seed * 1_000_000
    while True:
        for name in random.Random(number).sample(names, len(names)):
            yield number, name
            number += 1


def fuzz(
    minutes: float,
    seed: int,
    only: str = "",
    cases: int | None = None,
    shrink: bool = True,
    scripts: Path | None = None,
    crew: Crew | None = None,
) -> dict[str, Any]:
    """Runs cases for so long, or so many."""
    crew = crew or Crew()
    counts: collections.Counter[str] = collections.Counter()
    refusals: collections.Counter[str] = collections.Counter()
    failures = []
    start = reported = time.monotonic()
    try:
        for number, name in jobs(seed, only):
            now = time.monotonic()
            if now - start > 60 * minutes or sum(counts.values()) == cases:
                break
            if now - reported > 15:
                say(f"{(now - start) / 60:.1f} min, seed {number}: {dict(counts)}")
                reported = now
            outcome = crew.run(number, name, shrink)
            counts[outcome["verdict"]] += 1
            if outcome["verdict"] == "refused":
                refusals[outcome["said"].split(". ")[0][:200]] += 1
            if outcome["verdict"] in (*BAD, "one_device"):
                say(f"{outcome['verdict'].upper()} {number} {name}: {outcome['said']}")
            if outcome["verdict"] in BAD:
                say(outcome["script"])
                failures.append({k: outcome[k] for k in ("seed", "name", "verdict")})
            if scripts is not None and outcome["verdict"] in (*BAD, "one_device"):
                scripts.mkdir(parents=True, exist_ok=True)
                path = scripts / f"{outcome['verdict']}_{number}.py"
                path.write_text(outcome["script"], encoding="utf-8")
    finally:
        crew.close()
    total = sum(counts.values()) - counts["unusable"]
    return {
        "cases": total,
        "ok": counts["ok"],
        "wrong": counts["wrong"] + counts["error"],
        "refused": counts["refused"],
        "crashed": counts["crashed"],
        "shaky": counts["shaky"],
        "one_device": counts["one_device"],
        "unusable": counts["unusable"],
        "seed": seed,
        "minutes": round((time.monotonic() - start) / 60, 2),
        "failures": failures,
        "refusals": dict(refusals),
    }


def main() -> None:
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--minutes", type=float, default=10.0, help="how long (10)")
    add("--seed", type=int, default=0, help="decides all cases (0)")
    add("--only", default="", help="operations whose name has this text: a|b|c")
    add("--cases", type=int, help="how many at most")
    add("--no-shrink", action="store_true", help="print failing cases as drawn")
    add("--scripts", type=Path, help="folder for the scripts of what fails")
    options = parser.parse_args()
    start = time.perf_counter()
    result = fuzz(
        options.minutes,
        options.seed,
        options.only,
        options.cases,
        not options.no_shrink,
        options.scripts,
    )
    show(result | circumstances(start, options.minutes < 5), options.json)
    sys.exit(bool(result["wrong"] or result["crashed"]))


if __name__ == "__main__":
    main()
