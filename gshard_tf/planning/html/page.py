"""Plans as one self-contained HTML page, without a network or a server."""

import importlib.resources
from collections.abc import Sequence
from html import escape

from gshard_tf.planning import compare, units
from gshard_tf.planning.html import elements
from gshard_tf.planning.html.communication_section import communication_section
from gshard_tf.planning.html.cost_sections import (
    flops_section,
    memory_parts,
    memory_section,
    out_of_memory_section,
    step_time_section,
)
from gshard_tf.planning.html.variables_section import (
    devices_section,
    origin_section,
    variables_section,
)
from gshard_tf.planning.plan import Plan
from gshard_tf.planning.text import hardware

# The page may load nothing, whatever a name in a plan contains.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


def page(plans: Sequence[Plan]) -> str:
    """Returns one self-contained HTML page of one or more plans.

    It opens from a file, offline, in light and dark; all names are escaped. Without
    JavaScript, variables cannot be selected, filtered or sorted.

    Args:
        plans: At least one; with two, a comparison comes first.

    Raises:
        ValueError: for no plans.
    """
    if not plans:
        raise ValueError(f"A page needs at least one plan. Received: plans={plans}")
    files = importlib.resources.files(__package__)
    title = " and ".join(dict.fromkeys(f"{p.model} on {p.topology}" for p in plans))
    body = "".join(_plan(plan, i) for i, plan in enumerate(plans))
    return (
        "<!DOCTYPE html>\n"
        '<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Plan: {escape(title)}</title>"
        f"<style>{files.joinpath('page.css').read_text('utf-8')}</style></head><body>"
        f'<header class="top"><h1>{_heading(plans)}</h1>'
        '<p class="quiet">Compiled by gshard-tf without the hardware. Sizes '
        "are decimal (1 GB is 10<sup>9</sup> bytes), and of one core where they "
        "say so. Times are estimates, not measurements.</p></header>"
        f"<main>{_overview(plans)}{body}</main>"
        f"<script>{files.joinpath('page.js').read_text('utf-8')}</script>"
        "</body></html>\n"
    )


def _heading(plans: Sequence[Plan]) -> str:
    if len(plans) > 1:
        return f"{len(plans)} plans"
    return f"Plan of {escape(plans[0].model)} for {escape(plans[0].topology)}"


def _overview(plans: Sequence[Plan]) -> str:
    """Returns several plans as a table; for two, also their ratio."""
    if len(plans) == 1:
        return ""
    largest = max(plan.bytes_needed for plan in plans) or 1
    lines = []
    for i, plan in enumerate(plans):
        bar = elements.bar(memory_parts(plan), largest, "bare")
        time = "-" if plan.time is None else units.seconds(plan.time.roofline)
        lines.append(
            f'<tr><th scope="row"><a href="#plan-{i}">'
            f"{escape(elements.title(plan))}</a></th>"
            f"<td>{escape(elements.mesh_text(plan))}</td><td>{elements.badge(plan)}</td>"
            f"{elements.cell(units.size(plan.bytes_needed), 'on a core')}"
            f'<td class="wide">{bar}</td>'
            f"{elements.cell(time, 'step, at least (estimate)')}</tr>"
        )
    out = (
        '<section class="card"><h3>Side by side</h3><div class="scroll"><table><thead>'
        '<tr><th scope="col">plan</th><th scope="col">mesh</th><th scope="col"></th>'
        '<th scope="col" class="n">on a core</th><th scope="col"></th>'
        '<th scope="col" class="n">step, at least (estimate)</th></tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )
    if len(plans) == 2:
        a, b = plans
        notes = "".join(
            elements.note(text, "bad") for text in compare.differences(a, b)
        )
        cells = "".join(
            f'<tr><th scope="row">{elements.indented(name)}</th>'
            f"{elements.cell(x, 'A')}{elements.cell(y, 'B')}"
            f"{elements.cell(r, 'B / A' if r else '')}</tr>"
            for name, x, y, r in compare.rows(a, b)
        )
        out += (
            f"{notes}<details open><summary>Line by line</summary>"
            '<div class="scroll"><table><thead><tr><th></th>'
            f'<th scope="col" class="n">A: {escape(a.topology)}</th>'
            f'<th scope="col" class="n">B: {escape(b.topology)}</th>'
            '<th scope="col" class="n">B / A</th></tr></thead>'
            f"<tbody>{cells}</tbody></table></div></details>"
        )
    return out + "</section>"


def _plan(plan: Plan, number: int) -> str:
    return (
        f'<section class="plan" id="plan-{number}"><div class="title">'
        f"<h2>{escape(elements.title(plan))}</h2>{elements.badge(plan)}</div>"
        f"{_facts(plan)}{out_of_memory_section(plan)}{_notes(plan)}"
        f'<div class="pair">{memory_section(plan)}{step_time_section(plan)}</div>'
        f"{communication_section(plan)}{flops_section(plan)}"
        f"{variables_section(plan, number)}"
        f'<div class="pair">{devices_section(plan)}{origin_section(plan)}</div>'
        "</section>"
    )


def _facts(plan: Plan) -> str:
    facts = [
        ("mesh", elements.mesh_text(plan), hardware(plan)),
        ("parameters", units.number(plan.parameters),
         f"{units.size(plan.state_bytes())} with the optimizer"),
        ("memory of a core", units.size(plan.bytes_needed), _of_capacity(plan)),
    ]  # fmt: skip
    if plan.flops is not None:
        over = plan.flops_ratio
        facts.append(
            (
                "FLOPs of a core",
                units.flops(plan.flops),
                f"{over:.3f} of those written" if over else "",
            )
        )
    else:
        facts.append(
            ("FLOPs of a core", units.flops(plan.flops_as_written), "as written")
        )
    if plan.fits:
        facts.append(
            (
                "communication to a core",
                units.size(sum(part.bytes for part in plan.communication)),
                f"{sum(part.count for part in plan.communication):,} collectives",
            )
        )
    if plan.time is not None:
        facts.append(
            (
                "step, an estimate",
                units.seconds(plan.time.roofline),
                f"to {units.seconds(plan.time.without_overlap)} without overlap",
            )
        )
    cells = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}"
        f"<small>{escape(more)}</small></dd></div>"
        for name, value, more in facts
    )
    return f'<dl class="facts">{cells}</dl>'


def _of_capacity(plan: Plan) -> str:
    capacity = plan.bytes_available
    if not capacity:
        return "the host's"
    return f"{units.percent(plan.bytes_needed, capacity)} of {units.size(capacity)}"


def _notes(plan: Plan) -> str:
    if not plan.advice and not plan.complaints:
        return ""
    out = ""
    if plan.advice:
        out += "<h3>What to try</h3>" + "".join(
            elements.note(t, "try") for t in plan.advice
        )
    if plan.complaints:
        out += "<h3>What looks wrong</h3>" if not out else "<h4>What looks wrong</h4>"
        out += "".join(elements.note(text, "bad") for text in plan.complaints)
    return f'<section class="card">{out}</section>'
