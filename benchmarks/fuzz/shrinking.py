"""Makes a failing case smaller, line by line."""

import dataclasses
from typing import Any

from benchmarks.fuzz.case import Case


def verdict(program: dict[str, Any], want: Any = None) -> dict[str, str]:
    """Returns the verdict on the program of a case."""
    return program["check"](
        program["function"],
        program["make_layers"],
        program["make_inputs"](),
        program["AXES"],
        program["RULES"],
        program["PATHS"],
        want,
    )


def shrink(case: Case, bad: str) -> Case:
    """The case without the lines that its verdict `bad` does not need."""
    for index in reversed(range(1, len(case.lines))):
        lines = case.lines[:index] + case.lines[index + 1 :]
        case = _kept(case, dataclasses.replace(case, lines=lines), bad)
    for name in list(case.inputs):
        if not any(name in line for line in case.lines):
            inputs = {n: text for n, text in case.inputs.items() if n != name}
            case = _kept(case, dataclasses.replace(case, inputs=inputs), bad)
    return case


def _kept(case: Case, smaller: Case, bad: str) -> Case:
    """`smaller`, if it is as bad."""
    try:
        outcome = verdict(smaller.program())["verdict"]
    except Exception:
        return case  # no program
    return smaller if outcome == bad else case
