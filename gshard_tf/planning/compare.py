"""Comparison of two plans: a table with the ratio of every figure."""

import functools
from collections.abc import Callable

from gshard_tf.planning import summaries, units
from gshard_tf.planning.plan import Plan
from gshard_tf.planning.text import verdict

Row = tuple[str, str, str, str]


def compare(a: Plan, b: Plan) -> str:
    """Returns a table of both plans and the ratio of the second to the first.

    A figure that one of them lacks (a program that does not fit has no FLOPs, a CPU no
    estimate of time) is shown as `-`.
    """
    lines = [("", "A", "B", "B / A"), *rows(a, b)]
    widths = [max(len(line[i]) for line in lines) for i in range(4)]
    text = [
        "  ".join(
            [
                name.ljust(widths[0]),
                *(
                    cell.rjust(width)
                    for cell, width in zip(cells, widths[1:], strict=True)
                ),
            ]
        ).rstrip()
        for name, *cells in lines
    ]
    text.insert(1, "-" * max(map(len, text)))
    head = [
        f"A: {_title(a)}",
        f"B: {_title(b)}",
        *(f"! {note}" for note in differences(a, b)),
        "",
    ]
    return "\n".join([*head, *text, "", "Step times are estimates, not measurements."])


def rows(a: Plan, b: Plan) -> list[Row]:
    """Returns the lines of the comparison: name, first, second, ratio."""
    lines = [
        _row("cores", a, b, lambda p: p.num_devices, units.number),
        _row("parameters", a, b, lambda p: p.parameters, units.number),
        _row("capacity of a core", a, b, lambda p: p.bytes_available, units.size),
        _row("memory of a core", a, b, lambda p: p.bytes_needed, units.size),
    ]
    for role in summaries.ROLES:
        if any(p.state_bytes(role) for p in (a, b)):
            lines.append(
                _row(
                    f"  {summaries.ROLE_NAMES[role]}",
                    a,
                    b,
                    functools.partial(_bytes_of_role, role=role),
                    units.size,
                )
            )
    lines += [
        _row("  temporaries", a, b,
             lambda p: p.memory.temporaries if p.memory else None, units.size),
        _row("  outputs", a, b,
             lambda p: p.memory.outputs if p.memory else None, units.size),
        _row("FLOPs of a core", a, b, lambda p: p.flops, units.flops),
        _row("  over those written", a, b, lambda p: p.flops_ratio,
             lambda value: f"{value:.3f}"),
        _row("memory accesses of a core", a, b, lambda p: p.bytes_accessed, units.size),
    ]  # fmt: skip
    lines.append(_row("communication to a core", a, b, _received, units.size))
    kinds = sorted({part.kind for plan in (a, b) for part in plan.communication})
    for kind in kinds:
        lines += [
            _row(
                f"  {kind}", a, b, functools.partial(_received, kind=kind), units.size
            ),
            _row(
                "    number", a, b, functools.partial(_counted, kind=kind), units.number
            ),
        ]
    lines.append(
        _row(
            "reshards not asked for",
            a,
            b,
            lambda p: sum(r.count for r in p.reshards) if p.fits else None,
            units.number,
        )
    )
    for name, attribute in (
        ("step time, at least", "roofline"),
        ("  products", "compute"),
        ("  memory", "hbm"),
        ("  links", "interconnect"),
        ("step time, no overlap", "without_overlap"),
        ("step time, the compiler's", "compiler"),
    ):
        seconds = functools.partial(_seconds, attribute=attribute)
        lines.append(_row(name, a, b, seconds, units.seconds))
    lines.append(_row("compiled in", a, b, lambda p: p.compile_seconds, units.seconds))
    return lines


def differences(a: Plan, b: Plan) -> list[str]:
    """Returns the properties that make the two hard to compare, in sentences."""
    notes = []
    if a.mode != b.mode:
        notes.append(f"They are of different modes: {a.mode} and {b.mode}.")
    if a.inputs != b.inputs:
        notes.append(
            f"Their batches differ: {', '.join(a.inputs)} and {', '.join(b.inputs)}."
        )
    if _model(a) != _model(b):
        notes.append("Their models differ: not the same weights, shapes and dtypes.")
    if a.versions != b.versions:
        notes.append("They were made with different versions of packages.")
    return notes


def _model(plan: Plan) -> list[tuple]:
    # The names may differ by a number when both were made in one process.
    return [(w.shape, w.dtype) for w in plan.weights if w.role in ("weight", "frozen")]


def _title(plan: Plan) -> str:
    mesh = ", ".join(f"{axis}={size}" for axis, size in plan.mesh.items())
    return f"{plan.model}, {plan.mode}, on {plan.topology} ({mesh}): {verdict(plan)}"


def _bytes_of_role(plan: Plan, role: str) -> int:
    return plan.state_bytes(role, per_core=True)


def _seconds(plan: Plan, attribute: str) -> float | None:
    return None if plan.time is None else getattr(plan.time, attribute)


def _received(plan: Plan, kind: str | None = None) -> int | None:
    if not plan.fits:
        return None
    return sum(c.bytes for c in plan.communication if kind in (None, c.kind))


def _counted(plan: Plan, kind: str) -> int | None:
    return plan.count(kind) if plan.fits else None


def _row(
    name: str,
    a: Plan,
    b: Plan,
    value: Callable[[Plan], float | None],
    format_: Callable[[float], str],
) -> Row:
    old, new = value(a), value(b)
    return (
        name,
        "-" if old is None else format_(old),
        "-" if new is None else format_(new),
        units.ratio(new, old),
    )
