"""Two plans side by side."""

from collections.abc import Callable

from gshard_tf.planning import summaries, units
from gshard_tf.planning.plan import Plan
from gshard_tf.planning.text import verdict

Row = tuple[str, str, str, str]


def compare(a: Plan, b: Plan) -> str:
    """A table of both plans and the ratio of the second to the first.

    What is not known of one (a program that does not fit has no FLOPs, a CPU no
    estimate of time) is shown as `-`.
    """
    lines = [("", "A", "B", "B / A"), *rows(a, b)]
    widths = [max(len(line[i]) for line in lines) for i in range(4)]
    shown = [
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
    shown.insert(1, "-" * max(map(len, shown)))
    head = [
        f"A: {_title(a)}",
        f"B: {_title(b)}",
        *(f"! {text}" for text in differences(a, b)),
        "",
    ]
    return "\n".join([*head, *shown, "", "Step times are estimates, not measurements."])


def rows(a: Plan, b: Plan) -> list[Row]:
    """The lines of the comparison: name, first, second, ratio."""
    found = [
        _row("cores", a, b, lambda p: p.num_devices, units.number),
        _row("parameters", a, b, lambda p: p.parameters, units.number),
        _row("capacity of a core", a, b, lambda p: p.bytes_available, units.size),
        _row("memory of a core", a, b, lambda p: p.bytes_needed, units.size),
    ]
    for role in summaries.ROLES:
        if any(p.state_bytes(role) for p in (a, b)):
            found.append(
                _row(
                    f"  {summaries.ROLE_NAMES[role]}",
                    a,
                    b,
                    lambda p, role=role: p.state_bytes(role, per_core=True),
                    units.size,
                )
            )
    found += [
        _row("  temporaries", a, b, lambda p: p.memory and p.memory.temporaries,
             units.size),
        _row("  outputs", a, b, lambda p: p.memory and p.memory.outputs, units.size),
        _row("FLOPs of a core", a, b, lambda p: p.flops, units.flops),
        _row("  over those written", a, b, lambda p: p.flops_ratio,
             lambda value: f"{value:.3f}"),
        _row("memory accesses of a core", a, b, lambda p: p.bytes_accessed, units.size),
    ]  # fmt: skip
    found.append(_row("communication to a core", a, b, _received, units.size))
    kinds = sorted({part.kind for plan in (a, b) for part in plan.communication})
    for kind in kinds:
        found += [
            _row(f"  {kind}", a, b, lambda p, k=kind: _received(p, k), units.size),
            _row("    number", a, b, lambda p, k=kind: _counted(p, k), units.number),
        ]
    found.append(
        _row(
            "reshards not asked for",
            a,
            b,
            lambda p: sum(r.count for r in p.reshards) if p.fits else None,
            units.number,
        )
    )
    for name, value in (
        ("step time, at least", lambda t: t.roofline),
        ("  products", lambda t: t.compute),
        ("  memory", lambda t: t.hbm),
        ("  links", lambda t: t.interconnect),
        ("step time, no overlap", lambda t: t.without_overlap),
        ("step time, the compiler's", lambda t: t.compiler),
    ):
        found.append(
            _row(name, a, b, lambda p, v=value: p.time and v(p.time), units.seconds)
        )
    found.append(_row("compiled in", a, b, lambda p: p.compile_seconds, units.seconds))
    return found


def differences(a: Plan, b: Plan) -> list[str]:
    """What makes the two hard to compare, in sentences."""
    found = []
    if a.mode != b.mode:
        found.append(f"They are of different modes: {a.mode} and {b.mode}.")
    if a.inputs != b.inputs:
        found.append(
            f"Their batches differ: {', '.join(a.inputs)} and {', '.join(b.inputs)}."
        )
    if _model(a) != _model(b):
        found.append("Their models differ: not the same weights, shapes and dtypes.")
    if a.versions != b.versions:
        found.append("They were made with different versions of packages.")
    return found


def _model(plan: Plan) -> list[tuple]:
    # The names may differ by a number when both were made in one process.
    return [(w.shape, w.dtype) for w in plan.weights if w.role in ("weight", "frozen")]


def _title(plan: Plan) -> str:
    mesh = ", ".join(f"{axis}={size}" for axis, size in plan.mesh.items())
    return f"{plan.model}, {plan.mode}, on {plan.topology} ({mesh}): {verdict(plan)}"


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
    shown: Callable[[float], str],
) -> Row:
    old, new = value(a), value(b)
    return (
        name,
        "-" if old is None else shown(old),
        "-" if new is None else shown(new),
        units.ratio(new, old),
    )
