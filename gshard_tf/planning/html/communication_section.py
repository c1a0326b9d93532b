"""Section of the page about communication, by kind and by layer."""

import itertools
from collections.abc import Callable, Sequence
from html import escape

from gshard_tf.hlo.collectives import KINDS
from gshard_tf.planning import summaries, units
from gshard_tf.planning.html import elements
from gshard_tf.planning.plan import Plan
from gshard_tf.planning.records import Communication


def communication_section(plan: Plan) -> str:
    if not plan.fits:
        return ""
    out = '<section class="card"><h3>Communication in a step</h3>'
    if not plan.communication:
        return f'{out}<p class="quiet">None.</p></section>'
    timed = plan.time is not None
    kinds = summaries.by_kind(plan.communication)
    legend = "".join(
        f'<li><span class="key" style="--c:var(--{kind})"></span>{kind}</li>'
        for kind in KINDS
        if any(part.kind == kind for part in kinds)
    )
    if any(not part.asked for part in kinds):
        legend += (
            '<li><span class="key unasked" style="--c:var(--quiet)"></span>'
            "striped: no annotation asks for it</li>"
        )
    largest = max(part.bytes for part in kinds) or 1
    lines = "".join(
        f'<tr><th scope="row">{escape(part.kind)}</th>'
        f"<td>{elements.axis(part.axis)}</td>"
        f"{elements.cell('yes' if part.asked else 'no', 'asked for', _asked(part))}"
        f'<td class="wide">{elements.bar([_collective_part(part)], largest)}</td>'
        f"{_numbers(part.bytes, f'{part.count:,}', part.seconds, timed)}"
        "</tr>"
        for part in kinds
    )
    time_head = '<th scope="col" class="n">estimate</th>' if timed else ""
    out += (
        f'<ul class="legend">{legend}</ul><div class="scroll"><table><thead><tr>'
        '<th scope="col">kind</th><th scope="col">over</th><th scope="col">asked for'
        '</th><th></th><th scope="col" class="n">to a core</th>'
        f'<th scope="col" class="n">number</th>{time_head}</tr></thead>'
        f"<tbody>{lines}</tbody></table></div><h4>By layer</h4>"
    )
    totals = summaries.by_layer(plan.communication)
    out += _layer_table(totals, timed)
    if any(part.shared for part in plan.communication):
        out += (
            '<p class="quiet">1+2: one, and parts of two that count in other layers, '
            "with most of their bytes. The compiler combines small collectives.</p>"
        )
    if any(total.layers > 1 for total in totals):
        each = [
            summaries.LayerTotal(layer, 1, list(parts))
            for layer, parts in itertools.groupby(
                sorted(plan.communication, key=_layer_order(plan)),
                key=lambda part: part.layer,
            )
        ]
        out += (
            f"<details><summary>Each of the {len(each)} layers</summary>"
            f"{_layer_table(each, timed)}</details>"
        )
    return f"{out}{_reshards(plan)}</section>"


def _numbers(size: float, number: str, seconds: float, timed: bool) -> str:
    return (
        elements.cell(units.size(size), "to a core")
        + elements.cell(number, "number")
        + (elements.cell(units.seconds(seconds), "estimate") if timed else "")
    )


def _asked(part: Communication) -> str:
    return "" if part.asked else "unasked-for"


def _layer_order(plan: Plan) -> Callable[[Communication], int]:
    first: dict[str, int] = {}
    for part in plan.communication:
        first.setdefault(part.layer, len(first))
    return lambda part: first[part.layer]


def _layer_table(totals: Sequence[summaries.LayerTotal], timed: bool) -> str:
    largest = max(total.bytes for total in totals) or 1
    lines = "".join(
        f'<tr><th scope="row"><code>{escape(total.layer or "(no layer)")}</code>'
        f"{elements.times(total.layers, 'layers')}</th>"
        f"<td>{''.join(elements.axis(axis) for axis in _axis_names(total.parts))}</td>"
        f'<td class="wide">'
        f"{_bar(total.parts, largest)}</td>"
        f"{_numbers(total.bytes, total.number, total.seconds, timed)}</tr>"
        for total in totals
    )
    time_head = '<th scope="col" class="n">estimate</th>' if timed else ""
    return (
        '<div class="scroll"><table><thead><tr><th scope="col">layer</th>'
        '<th scope="col">over</th><th></th><th scope="col" class="n">to a core</th>'
        f'<th scope="col" class="n">number</th>{time_head}</tr></thead>'
        f"<tbody>{lines}</tbody></table></div>"
    )


def _reshards(plan: Plan) -> str:
    if not plan.reshards:
        return '<p class="quiet">All of it is asked for by annotations.</p>'
    notes = "".join(
        f'<div class="note"><b>{r.count:,} {escape(r.kind)}</b> of '
        f"<code>{escape(r.shape)}</code> over {elements.axis(r.axis)} in "
        f"<code>{escape(r.layer or 'no layer')}</code>, "
        f"{units.size(r.bytes)} to a core<p>{escape(r.advice)}</p></div>"
        for r in plan.reshards
    )
    return f"<h4>Changes of layout that no annotation implies</h4>{notes}"


def _bar(parts: Sequence[Communication], largest: float) -> str:
    return elements.bar(map(_collective_part, summaries.by_kind(parts)), largest)


def _collective_part(part: Communication) -> elements.Part:
    key = part.kind if part.kind in KINDS else "other"
    number = f"{part.count:,}" if part.count else f"part of {part.shared:,}"
    label = f"{number} {part.kind} over {part.axis or '-'}"
    return (key, label, part.bytes) if part.asked else (f"{key}!", label, part.bytes)


def _axis_names(parts: Sequence[Communication]) -> list[str]:
    return list(dict.fromkeys(part.axis for part in parts))
