"""Faults put into the code one at a time: do the tests notice?

    python -m benchmarks.mutants [--only PATTERN] [--json]

Each mutant is run on a copy of the project, with the tests that are there to notice it;
before, the same tests pass without. The exit status is 1 when a mutant survives that is
not known to, or one that is known to is caught.
"""

import collections
import re
import sys
import time
from collections.abc import Sequence
from typing import Any

from benchmarks.harness.command_line import (
    circumstances,
    make_parser,
    say,
    show,
)
from benchmarks.mutants import checkpoints, losses, packing, routing, strategy, tpu
from benchmarks.mutants.mutant import Mutant, check
from benchmarks.mutants.running import ROOT, Copy, copy_of_the_project

SUBJECTS: dict[str, tuple[Mutant, ...]] = {
    "checkpoints": checkpoints.MUTANTS,
    "losses": losses.MUTANTS,
    "packing": packing.MUTANTS,
    "routing": routing.MUTANTS,
    "strategy": strategy.MUTANTS,
    "tpu": tpu.MUTANTS,
}

#: Seconds for the tests of one mutant.
LIMIT = 300.0


def chosen(only: str) -> list[tuple[str, Mutant]]:
    """The mutants with their subjects whose subject, file or fault match a pattern.

    Raises:
        ValueError: when none does.
    """
    found = [
        (subject, mutant)
        for subject, mutants in SUBJECTS.items()
        for mutant in mutants
        if re.search(only, f"{subject} {mutant.file}: {mutant.breaks}")
    ]
    if not found:
        raise ValueError(f"No mutant matches. Received: only={only!r}")
    return found


def require_tests_pass(copy: Copy, mutants: Sequence[Mutant]) -> float:
    """Runs the tests of all mutants without a fault; how many seconds they took.

    Raises:
        RuntimeError: when one fails.
    """
    tests = list(dict.fromkeys(test for mutant in mutants for test in mutant.tests))
    ending = copy.run(tests, LIMIT * len(tests))
    if ending.verdict != "passed":
        raise RuntimeError(
            f"The tests do not pass without a mutant: {ending.by}\n"
            f"{ending.printed[-4000:]}"
        )
    return ending.seconds


def run(copy: Copy, subject: str, mutant: Mutant) -> dict[str, Any]:
    """Runs the tests of one mutant; what came of it.

    "broken" is neither caught nor survived: no test came to run.
    """
    with copy.with_fault(mutant):
        ending = copy.run(mutant.tests, LIMIT)
    wanted = "failed" if mutant.survives is None else "passed"
    verdicts = {"failed": "caught", "passed": "survived", "broken": "broken"}
    return {
        "subject": subject,
        "file": mutant.file,
        "breaks": mutant.breaks,
        "verdict": verdicts[ending.verdict],
        "by": ending.by,
        "expected": ending.verdict == wanted,
        "survives": mutant.survives,
        "seconds": round(ending.seconds, 1),
    }


def summary(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The counts of all mutants, and of each subject."""
    subjects: dict[str, collections.Counter[str]] = {}
    for result in results:
        counts = subjects.setdefault(result["subject"], collections.Counter())
        counts["mutants"] += 1
        counts[result["verdict"]] += 1
    total = sum(subjects.values(), collections.Counter())
    return {
        "mutants": total["mutants"],
        "caught": total["caught"],
        "survived": total["survived"],
        "survivors_explained": sum(
            r["verdict"] == "survived" and r["expected"] for r in results
        ),
        "unexpected": [
            f"{r['verdict']}: {r['file']}: {r['breaks']}"
            for r in results
            if not r["expected"]
        ],
        "by_subject": {name: dict(counts) for name, counts in subjects.items()},
    }


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--only", default="", help="a pattern for subject, file, fault")
    options = parser.parse_args()
    begun = time.perf_counter()
    mutants = chosen(options.only)
    check([mutant for _, mutant in mutants], ROOT)
    results = []
    with copy_of_the_project() as copy:
        say(f"{len(mutants)} mutants; their tests without a fault ...")
        seconds = require_tests_pass(copy, [mutant for _, mutant in mutants])
        say(f"pass, in {seconds:.0f} s")
        for number, (subject, mutant) in enumerate(mutants, 1):
            result = run(copy, subject, mutant)
            results.append(result)
            say(
                f"{number}/{len(mutants)} {result['verdict']}"
                f"{'' if result['expected'] else ' (NOT EXPECTED)'} "
                f"{result['seconds']:.0f} s  {mutant.file}: {mutant.breaks}"
                f"{' <- ' + result['by'] if result['by'] else ''}"
            )
    found = summary(results)
    if options.json:
        found["results"] = results
    show(found | circumstances(begun, bool(options.only)), options.json)
    sys.exit(1 if found["unexpected"] else 0)


if __name__ == "__main__":
    main()
