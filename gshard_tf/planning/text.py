"""A plan as a table for the terminal."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

from gshard_tf.planning import summaries, units
from gshard_tf.planning.records import Communication, OutOfMemory

if TYPE_CHECKING:
    from gshard_tf.planning.plan import Plan

WIDTH = 92
_BAR = 30
# The largest number of each, so that a plan fits on two screens.
_WEIGHTS, _COLLECTIVES, _LAYERS, _RESHARDS, _BUFFERS, _NOTES = 5, 6, 5, 3, 6, 4


def table(plan: Plan) -> str:
    """Returns the plan as text of at most some 60 lines, `WIDTH` columns wide.

    Weights are summed by role, collectives by kind and by layer; layers whose names
    differ only in a number are one. The HTML page and the JSON have all of them.
    """
    lines = _head(plan)
    if plan.out_of_memory is not None:
        lines += _out_of_memory(plan.out_of_memory)
    lines += _memory(plan)
    lines += _variables(plan)
    lines += _communication(plan)
    lines += _work(plan)
    for text in plan.complaints[:_NOTES]:
        lines += _wrapped(text, "! ")
    if len(plan.complaints) > _NOTES:
        lines.append(f"! and {len(plan.complaints) - _NOTES} more complaints")
    for text in plan.advice:
        lines += _wrapped(text, "> ")
    lines += _origin(plan)
    return "\n".join(line.rstrip() for line in lines)


def verdict(plan: Plan) -> str:
    """Returns whether the plan fits, in a few words."""
    if plan.out_of_memory is not None:
        oom = plan.out_of_memory
        return f"OUT OF MEMORY by {units.size(oom.needed - oom.capacity)} a core"
    if plan.memory is None or not plan.memory.capacity:
        return "compiles; memory is the host's"
    part = units.percent(plan.memory.total, plan.memory.capacity)
    return f"fits: {part} of a core's {units.size(plan.memory.capacity)}"


def hardware(plan: Plan) -> str:
    """Returns cores and chips in words."""
    if plan.chip is None:
        return f"{plan.num_devices:,} virtual CPU devices"
    chips = plan.num_devices // plan.chip["devices"]
    shape = units.dims(plan.slice_shape)
    return (
        f"{plan.num_devices:,} cores on {chips:,} chips {plan.chip['name']} ({shape})"
    )


def _head(plan: Plan) -> list[str]:
    mesh = ", ".join(f"{axis}={size}" for axis, size in plan.mesh.items())
    return [
        f"{plan.model}, {plan.mode}, on {plan.topology}: {verdict(plan)}",
        "=" * WIDTH,
        f"mesh     {mesh}: {hardware(plan)}",
        *_wrapped(summaries.rules_by_axis(plan) or "none", "rules    "),
        *_wrapped(", ".join(plan.inputs) + " (global)", "batch    "),
        f"model    {units.number(plan.parameters)} parameters in "
        f"{sum(w.role in ('weight', 'frozen') for w in plan.weights):,} weights",
        *(
            f"pipeline {p.name}: {p.stages} stages, {p.microbatches} microbatches, "
            f"{units.percent(p.bubble, 1)} of the time a bubble"
            for p in plan.pipelines
        ),
    ]


def _out_of_memory(oom: OutOfMemory) -> list[str]:
    lines = [
        "",
        f"OUT OF MEMORY: needs {units.size(oom.needed)} of "
        f"{units.size(oom.capacity)} a core, "
        f"{units.size(oom.needed - oom.capacity)} too much",
    ]
    if not oom.buffers:
        return lines + ["  (the compiler named no buffers)"]
    rows = [
        (units.size(b.bytes), b.shape, b.operation or "-", b.layer or "-")
        for b in sorted(oom.buffers, key=lambda b: -b.bytes)[:_BUFFERS]
    ]
    if oom.as_written:
        lines.append("  (the compiler named no buffers; these are whole, as written)")
    return lines + columns(("largest", "shape", "operation", "layer"), rows, "r")


def _memory(plan: Plan) -> list[str]:
    segments = summaries.memory_segments(plan)
    if not segments:
        return []
    capacity = plan.bytes_available
    total = sum(segment.bytes for segment in segments)
    scale = max(capacity or 0, total) or 1
    rows = [(s.label, units.size(s.bytes), _bar(s.bytes / scale)) for s in segments]
    room = _bar(total / scale)
    if capacity:
        room += f"  of {units.size(capacity)}, {units.percent(total, capacity)}"
    rows.append(("sum", units.size(total), room))
    return ["", *columns(("memory of a core", "", ""), rows, "lr")]


def _variables(plan: Plan) -> list[str]:
    rows = []
    for role in summaries.ROLES:
        weights = [w for w in plan.weights if w.role == role]
        if weights:
            rows.append(
                (
                    summaries.ROLE_NAMES[role],
                    f"{len(weights):,}",
                    units.size(sum(w.bytes for w in weights)),
                    units.size(sum(w.bytes_per_core for w in weights)),
                    "",
                    "",
                )
            )
    groups = summaries.group_similar(
        (w for w in plan.weights if w.role in ("weight", "frozen")),
        lambda w: w.path,
        lambda w: (w.shape, w.layout, w.dtype),
    )
    groups.sort(key=lambda group: -sum(w.bytes_per_core for w in group.items))
    for group in groups[:_WEIGHTS]:
        first = group.items[0]
        rows.append(
            (
                f"  {_short(group.name, 34)}",
                f"{len(group.items):,}",
                units.size(sum(w.bytes for w in group.items)),
                units.size(sum(w.bytes_per_core for w in group.items)),
                units.dims(first.shape),
                ",".join(axis or "-" for axis in first.layout),
            )
        )
    if not rows:
        return []
    head = ("variables", "number", "whole", "on a core", "shape of one", "split over")
    return ["", *columns(head, rows, "lrrr")]


def _communication(plan: Plan) -> list[str]:
    if plan.out_of_memory is not None:
        return []
    if not plan.communication:
        return ["", "communication: none"]
    timed = plan.time is not None
    lines = [""]

    def row(
        name: str, parts: Sequence[Communication], note: str, number: str = ""
    ) -> tuple:
        return (
            name,
            number or units.number(sum(part.count for part in parts)),
            units.size(sum(part.bytes for part in parts)),
            units.seconds(sum(part.seconds for part in parts)) if timed else "",
            note,
        )

    rows = [
        row(
            part.kind,
            [part],
            f"{'' if part.asked else 'NOT asked for, '}{part.axis or '-'}",
        )
        for part in summaries.by_kind(plan.communication)[:_COLLECTIVES]
    ]
    layers = summaries.by_layer(plan.communication)
    for total in layers[:_LAYERS]:
        kinds = ", ".join(sorted({part.kind for part in total.parts}))
        name = _short(_named(total.layer, total.layers), 35)
        rows.append(row(f"  {name}", total.parts, kinds, total.number))
    rest = [part for total in layers[_LAYERS:] for part in total.parts]
    if rest:
        rows.append(row(f"  {len(layers) - _LAYERS} more", rest, ""))
    head = ("collectives of a step", "number", "to a core", "estimate", "over")
    if not timed:
        head = (*head[:3], "", head[4])
    lines += columns(head, rows, "lrrr")
    if any(part.shared for total in layers[:_LAYERS] for part in total.parts):
        lines.append("  1+2: one, and parts of two that count in other layers")
    for reshard in plan.reshards[:_RESHARDS]:
        where = reshard.layer or "no layer"
        lines.append(
            _short(
                f"! {reshard.count} {reshard.kind} of {reshard.shape} over "
                f"{reshard.axis or '-'} in {where}, not asked for:",
                WIDTH,
            )
        )
        lines += _wrapped(reshard.advice, "    ")
    if len(plan.reshards) > _RESHARDS:
        lines.append(f"! and {len(plan.reshards) - _RESHARDS} more such reshards")
    return lines


def _work(plan: Plan) -> list[str]:
    lines = [""]
    if plan.flops is not None:
        over = plan.flops_ratio
        lines.append(
            f"matmuls  {units.flops(plan.flops)} a core"
            + (f", {over:.3f} of those written in the model" if over else "")
        )
    elif plan.flops_as_written:
        lines.append(
            f"matmuls  {units.flops(plan.flops_as_written)} a core, as written"
        )
    if plan.time is None:
        if plan.fits:
            lines.append("step time: none for a CPU, whose cores are virtual")
        return lines
    t = plan.time
    lines.append(
        f"step time (an estimate, not a measurement): {units.seconds(t.roofline)} to "
        f"{units.seconds(t.without_overlap)}"
    )
    parts = [("matmuls", t.compute), ("memory", t.hbm), ("links", t.interconnect)]
    longest = max(value for _, value in parts) or 1.0
    rows = [
        (name, units.seconds(value), _bar(value / longest)) for name, value in parts
    ]
    if t.compiler is not None:
        rows.append(("compiler", units.seconds(t.compiler), "its own estimate"))
    lines += columns(None, rows, "lr")
    for text in t.assumptions:
        lines += _wrapped(text, "  - ")
    return lines


def _origin(plan: Plan) -> list[str]:
    versions = ", ".join(f"{name} {v}" for name, v in plan.versions.items())
    return [
        "",
        *_wrapped(
            f"traced in {plan.trace_seconds:.1f} s, compiled by "
            f"{summaries.compiler(plan.chip is not None, plan.versions)} in "
            f"{plan.compile_seconds:.1f} s with {units.size(plan.host_bytes)} of this "
            f"machine's memory; {versions}",
            "",
        ),
    ]


def _named(layer: str, layers: int) -> str:
    return f"{layer or '(no layer)'}{f' ({layers} layers)' if layers > 1 else ''}"


def _bar(part: float) -> str:
    length = round(_BAR * part)
    return "#" * (max(length, 1) if part > 0 else 0)


def _short(text: str, width: int) -> str:
    """Returns text shortened at its beginning, which is the least specific."""
    return text if len(text) <= width else "..." + text[len(text) - width + 3 :]


def _wrapped(text: str, mark: str) -> list[str]:
    return textwrap.wrap(
        text, WIDTH, initial_indent=mark, subsequent_indent=" " * len(mark)
    )


def columns(
    head: Sequence[str] | None, rows: Sequence[Sequence[str]], align: str
) -> list[str]:
    """Returns lines of aligned columns; `align` has `r` for right-aligned ones."""
    lines = [*([head] if head else []), *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text_lines = []
    for line in lines:
        cells = [
            cell.rjust(width) if align[i : i + 1] == "r" else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
            if width
        ]
        text = ("" if head else "  ") + "  ".join(cells).rstrip()
        text_lines.append(text if len(text) <= WIDTH else text[: WIDTH - 3] + "...")
    if head:
        text_lines.insert(1, "-" * WIDTH)
    return text_lines
