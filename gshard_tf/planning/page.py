"""Plans as one HTML page that needs nothing else, neither a network nor a server."""

import importlib.resources
import itertools
from collections.abc import Iterable, Sequence
from html import escape

from gshard_tf.inspection import KINDS
from gshard_tf.planning import compare, grouping, pictures, units
from gshard_tf.planning.chips import CHIPS
from gshard_tf.planning.plan import Communication, Plan, Weight
from gshard_tf.planning.table import hardware, verdict

# Nothing may be loaded from anywhere, whatever a name in a plan holds.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


def page(plans: Sequence[Plan]) -> str:
    """One self-contained HTML page of one or more plans.

    It opens from a file, offline, in light and dark; all names are escaped. Without
    JavaScript all is there but choosing, filtering and sorting variables.

    Args:
        plans: At least one; of two, a comparison comes first.

    Raises:
        ValueError: when there is no plan.
    """
    if not plans:
        raise ValueError("A page needs at least one plan. Received: no plans")
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
        '<p class="quiet">Compiled by gshard-tf for hardware that was not there. Sizes '
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
    """All plans in a table, when there are several; of two, their ratio."""
    if len(plans) == 1:
        return ""
    largest = max(_needed(plan) for plan in plans) or 1
    lines = []
    for i, plan in enumerate(plans):
        time = "-" if plan.time is None else units.seconds(plan.time.roofline)
        lines.append(
            f'<tr><th scope="row"><a href="#plan-{i}">{escape(_name(plan))}</a></th>'
            f"<td>{escape(_mesh_text(plan))}</td><td>{_badge(plan)}</td>"
            f'<td class="n">{units.size(_needed(plan))}</td>'
            f'<td class="wide">{_bar(_memory_parts(plan), largest, "bare")}</td>'
            f'<td class="n">{time}</td></tr>'
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
        notes = "".join(_note(text, "bad") for text in compare.differences(a, b))
        cells = "".join(
            f'<tr><th scope="row">{_indented(name)}</th><td class="n">{escape(x)}</td>'
            f'<td class="n">{escape(y)}</td><td class="n">{escape(r)}</td></tr>'
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
        f"<h2>{escape(_name(plan))}</h2>{_badge(plan)}</div>"
        f"{_facts(plan)}{_out_of_memory(plan)}{_notes(plan)}"
        f'<div class="pair">{_memory(plan)}{_time(plan)}</div>'
        f"{_communication(plan)}{_work(plan)}{_weights(plan, number)}"
        f'<div class="pair">{_devices(plan)}{_made(plan)}</div></section>'
    )


def _facts(plan: Plan) -> str:
    facts = [
        ("mesh", _mesh_text(plan), hardware(plan)),
        ("parameters", units.number(plan.parameters),
         f"{units.size(plan.state_bytes())} with the optimizer"),
        ("memory of a core", units.size(_needed(plan)), _of_capacity(plan)),
    ]  # fmt: skip
    if plan.flops is not None:
        over = plan.flops_over_written
        facts.append(
            (
                "products of a core",
                units.flops(plan.flops),
                f"{over:.3f} of those written" if over else "",
            )
        )
    else:
        facts.append(
            ("products of a core", units.flops(plan.flops_as_written), "as written")
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


def _out_of_memory(plan: Plan) -> str:
    oom = plan.out_of_memory
    if oom is None:
        return ""
    out = (
        '<section class="card"><h3>It does not fit</h3>'
        f"<p>A core would need <b>{units.size(oom.needed)}</b> and has "
        f"{units.size(oom.capacity)} for it: "
        f"<b>{units.size(oom.needed - oom.capacity)} too much</b>.</p>"
    )
    if oom.buffers:
        buffers = sorted(oom.buffers, key=lambda b: -b.bytes)
        lines = "".join(
            f'<tr><th scope="row"><code>{escape(b.shape)}</code></th>'
            f"<td><code>{escape(b.layer or '-')}</code></td>"
            f"<td><code>{escape(b.operation or '-')}</code></td>"
            f'<td class="n">{units.size(b.bytes)}</td><td class="wide">'
            f"{_bar([('temporary', b.shape, b.bytes)], oom.capacity)}</td></tr>"
            for b in buffers
        )
        what = (
            "The compiler named no buffers: the largest tensors as written, whole"
            if oom.as_written
            else "The largest buffers"
        )
        out += (
            f"<h4>{what}, beside the memory of a core</h4>"
            '<div class="scroll"><table><thead><tr><th scope="col">shape</th>'
            '<th scope="col">layer</th>'
            '<th scope="col">operation</th><th scope="col" class="n">size</th>'
            f"<th></th></tr></thead><tbody>{lines}</tbody></table></div>"
        )
    else:
        out += '<p class="quiet">The compiler named no buffers.</p>'
    return out + (
        "<details><summary>What the compiler said</summary>"
        f'<p class="mono">{escape(oom.message[:4000])}</p></details></section>'
    )


def _notes(plan: Plan) -> str:
    if not plan.advice and not plan.complaints:
        return ""
    out = ""
    if plan.advice:
        out += "<h3>What to try</h3>" + "".join(_note(t, "try") for t in plan.advice)
    if plan.complaints:
        out += "<h3>What looks wrong</h3>" if not out else "<h4>What looks wrong</h4>"
        out += "".join(_note(text, "bad") for text in plan.complaints)
    return f'<section class="card">{out}</section>'


def _memory(plan: Plan) -> str:
    parts = _memory_parts(plan)
    if not parts:
        return ""
    capacity = _capacity(plan)
    total = _needed(plan)
    scale = max(capacity or 0, total) or 1
    limit = ""
    if capacity:
        place = 100 * capacity / scale
        side = " left" if place < 40 else ""
        limit = (
            f'<div class="limit{side}" style="left:{place:.2f}%">'
            f"<b>a core has {units.size(capacity)}</b></div>"
        )
    closer = ""
    if total < 0.1 * scale:
        closer = (
            f'<p class="quiet">Only what is used:</p>{_bar(parts, total or 1, "tall")}'
        )
    lines = "".join(
        f'<tr><th scope="row"><span class="key" style="--c:var(--{key})"></span>'
        f'{escape(label)}</th><td class="n">{units.size(value)}</td>'
        f'<td class="n">{units.percent(value, capacity or scale)}</td></tr>'
        for key, label, value in parts
    )
    return (
        '<section class="card"><h3>Memory of a core</h3>'
        f'<div class="memory">{_bar(parts, scale, "tall")}{limit}</div>{closer}'
        f'<table style="margin-top:14px"><tbody>{lines}</tbody><tfoot><tr>'
        f'<th scope="row">sum</th><td class="n">{units.size(total)}</td>'
        f'<td class="n">{units.percent(total, capacity or scale)}</td></tr></tfoot>'
        "</table></section>"
    )


def _time(plan: Plan) -> str:
    if not plan.fits:
        return ""
    out = '<section class="card"><h3>Time of a step: an estimate, not a measurement'
    t = plan.time
    if t is None:
        why = "None for a CPU, whose cores are virtual."
        return f'{out}</h3><p class="quiet">{why}</p></section>'
    values = [
        ("products at the chip's peak", t.compute, "work"),
        ("memory accesses", t.hbm, "temporary"),
        ("communication", t.interconnect, "all-to-all"),
        ("at least: the longest of these", t.roofline, "code"),
        ("without overlap", t.without_overlap, "code"),
    ]
    if t.compiler is not None:
        values.append(("the compiler's own estimate", t.compiler, "other"))
    longest = max(value for _, value, _ in values) or 1
    lines = "".join(
        f'<tr><th scope="row">{escape(name)}</th><td class="wide">'
        f"{_bar([(key, name, value)], longest, '', units.seconds)}</td>"
        f'<td class="n">{units.seconds(value)}</td></tr>'
        for name, value, key in values
    )
    assumed = "".join(f"<li>{escape(text)}</li>" for text in t.assumptions)
    return (
        f"{out}</h3><table><tbody>{lines}</tbody></table>"
        f'<h4>It assumes</h4><ul class="quiet">{assumed}</ul></section>'
    )


def _communication(plan: Plan) -> str:
    if not plan.fits:
        return ""
    out = '<section class="card"><h3>Communication in a step</h3>'
    if not plan.communication:
        return f'{out}<p class="quiet">None.</p></section>'
    timed = plan.time is not None
    kinds = grouping.by_kind(plan.communication)
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
        f'<tr><th scope="row">{escape(part.kind)}</th><td>{_axes(part.axis)}</td>'
        f"<td>{'yes' if part.asked else '<b>no</b>'}</td>"
        f'<td class="wide">{_bar([_collective_part(part)], largest)}</td>'
        f'<td class="n">{units.size(part.bytes)}</td><td class="n">{part.count:,}</td>'
        + (f'<td class="n">{units.seconds(part.seconds)}</td>' if timed else "")
        + "</tr>"
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
    totals = grouping.by_layer(plan.communication)
    out += _layer_table(totals, timed)
    if any(total.layers > 1 for total in totals):
        each = [
            grouping.LayerTotal(layer, 1, list(parts))
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


def _layer_order(plan: Plan):
    first = {}
    for part in plan.communication:
        first.setdefault(part.layer, len(first))
    return lambda part: first[part.layer]


def _layer_table(totals: Sequence[grouping.LayerTotal], timed: bool) -> str:
    largest = max(total.bytes for total in totals) or 1
    lines = "".join(
        f'<tr><th scope="row"><code>{escape(total.layer or "(no layer)")}</code>'
        f"{_times(total.layers, 'layers')}</th>"
        f"<td>{''.join(_axes(axis) for axis in _axis_names(total.parts))}</td>"
        f'<td class="wide">'
        f"{_bar([_collective_part(p) for p in grouping.by_kind(total.parts)], largest)}"
        f'</td><td class="n">{units.size(total.bytes)}</td>'
        f'<td class="n">{total.count:,}</td>'
        + (
            f'<td class="n">{units.seconds(sum(p.seconds for p in total.parts))}</td>'
            if timed
            else ""
        )
        + "</tr>"
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
        f"<code>{escape(r.shape)}</code> over {_axes(r.axis)} in "
        f"<code>{escape(r.layer or 'no layer')}</code>, "
        f"{units.size(r.bytes)} to a core<p>{escape(r.advice)}</p></div>"
        for r in plan.reshards
    )
    return f"<h4>Changes of layout that nobody asked for</h4>{notes}"


def _work(plan: Plan) -> str:
    if not plan.flops_by_layer:
        return ""
    groups = grouping.alike(plan.flops_by_layer.items(), lambda item: item[0])
    sums = [
        (group.name, len(group.items), sum(value for _, value in group.items))
        for group in groups
    ]
    sums.sort(key=lambda item: -item[2])
    out = (
        '<section class="card"><h3>Products by layer</h3>'
        f"{_work_table(sums, plan.flops)}"
    )
    if any(count > 1 for _, count, _ in sums):
        each = [(name, 1, value) for name, value in plan.flops_by_layer.items()]
        out += (
            f"<details><summary>Each of the {len(each)} layers</summary>"
            f"{_work_table(each, plan.flops)}</details>"
        )
    return f"{out}</section>"


def _work_table(sums: Sequence[tuple[str, int, float]], whole: float | None) -> str:
    largest = max(value for _, _, value in sums) or 1
    lines = "".join(
        f'<tr><th scope="row"><code>{escape(name or "(no layer)")}</code>'
        f'{_times(count, "layers")}</th><td class="wide">'
        f"{_bar([('work', name, value)], largest, '', units.flops)}</td>"
        f'<td class="n">{units.flops(value)}</td>'
        f'<td class="n">{units.percent(value, whole) if whole else ""}</td></tr>'
        for name, count, value in sums
    )
    return f'<div class="scroll"><table><tbody>{lines}</tbody></table></div>'


def _weights(plan: Plan, number: int) -> str:
    groups = grouping.alike(
        plan.weights, lambda w: w.path, lambda w: (w.shape, w.layout, w.dtype, w.role)
    )
    groups.sort(key=lambda group: -sum(w.bytes_per_core for w in group.items))
    maps: dict[tuple, str] = {}
    lines = []
    for group in groups:
        first: Weight = group.items[0]
        drawn = maps.setdefault((first.shape, first.layout), str(len(maps)))
        lines.append(_weight_row(plan, group, drawn))
    figures = "".join(
        f'<div data-map="{name}">{pictures.weight_map(shape, layout, plan.mesh)}</div>'
        for (shape, layout), name in maps.items()
    )
    roles = {w.role for w in plan.weights}
    options = "".join(
        f'<option value="{role}"{" selected" if role == "weight" else ""}>'
        f"{grouping.ROLE_NAMES[role]}</option>"
        for role in grouping.ROLES
        if role in roles
    )
    heads = "".join(
        f'<th scope="col"{css}><button type="button" data-key="{key}">{name}</button>'
        "</th>"
        for key, name, css in (
            ("name", "variable", ""),
            ("count", "number", ' class="n"'),
            ("bytes", "whole", ' class="n"'),
            ("core", "on a core", ' class="n"'),
        )
    )
    return (
        '<section class="card weights"><h3>Variables on the mesh</h3>'
        '<div class="controls" hidden>'
        f'<label for="find-{number}">Find <input id="find-{number}" type="search" '
        'placeholder="part of a name"></label>'
        f'<label for="role-{number}">Role <select id="role-{number}">'
        f'<option value="">all</option>{options}</select></label>'
        '<span class="quiet told" role="status"></span></div>'
        '<div class="rows" tabindex="0" role="region" aria-label="Variables">'
        f"<table><thead><tr>{heads}"
        '<th scope="col">shape of one</th><th scope="col">split over</th>'
        '<th scope="col">decided by</th></tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
        '<noscript><p class="quiet">To choose one needs JavaScript.</p></noscript>'
        '<figure class="map" aria-live="polite"><figcaption><b class="mono"></b>'
        '<div class="quiet says"></div><details class="names" hidden><summary>Their '
        f"names</summary><code></code></details></figcaption>{figures}</figure></section>"
    )


def _weight_row(plan: Plan, group: grouping.Alike, drawn: str) -> str:
    first: Weight = group.items[0]
    whole = sum(w.bytes for w in group.items)
    core = sum(w.bytes_per_core for w in group.items)
    copies = grouping.copies(plan, first)
    parts = plan.cores // copies
    each = "Each of them: " if len(group.items) > 1 else ""
    says = (
        f"{each}{first.dtype} {units.dims(first.shape)}, {units.size(first.bytes)}, "
        + (
            f"in {parts:,} parts of {units.size(first.bytes_per_core)}, each on "
            f"{copies:,} of {plan.cores:,} cores."
            if parts > 1
            else f"whole on each of the {plan.cores:,} cores."
        )
    )
    names = [w.path for w in group.items]
    layout = " ".join(
        _axes(axis) if axis else '<span class="quiet">-</span>' for axis in first.layout
    )
    rules = list(dict.fromkeys(w.rule for w in group.items))
    rule = rules[0] if len(rules) == 1 else f"{rules[0]}, and others"
    return (
        f'<tr data-map="{drawn}" data-role="{escape(first.role)}" '
        f'data-name="{escape(group.name)}" data-names="{escape(chr(10).join(names))}" '
        f'data-count="{len(names)}" data-bytes="{whole}" data-core="{core}" '
        f'data-says="{escape(says)}"><th scope="row"><button type="button" '
        f'class="pick">{escape(group.name)}</button></th>'
        f'<td class="n">{len(names):,}</td><td class="n">{units.size(whole)}</td>'
        f'<td class="n">{units.size(core)}</td>'
        f'<td class="mono">{units.dims(first.shape)}</td><td>{layout}</td>'
        f'<td class="quiet">{escape(rule)}</td></tr>'
    )


def _devices(plan: Plan) -> str:
    wraps_at = None
    facts = ""
    if plan.chip is not None:
        chip = plan.chip
        known = CHIPS.get(chip["name"])
        wraps_at = known.wraps_at if known else None
        per = chip["devices"]
        facts = (
            f'<p class="quiet">A chip {escape(str(chip["name"]))}: '
            f"{chip['flops'] / 1e12:,.0f} TFLOP/s, {units.size(chip['hbm_bytes'])} at "
            f"{units.size(chip['hbm_bandwidth'])}/s, links of "
            f"{units.size(chip['link_bandwidth'])}/s in each direction"
            + (f"; its {per} cores share them" if per > 1 else "")
            + f". {_links_in_words(plan, wraps_at)}</p>"
        )
    return (
        f'<section class="card"><h3>Devices: {escape(hardware(plan))}</h3>'
        f"{pictures.chips(plan, wraps_at)}{facts}</section>"
    )


def _links_in_words(plan: Plan, wraps_at: int | None) -> str:
    says = "Lines between chips are links"
    if any(pictures.is_ring(n, wraps_at) for n in plan.slice_shape):
        says += "; where they go on beyond the edge, the ends are joined to a ring"
    if len(plan.slice_shape) > 2:
        says += "; chips in the same place of neighbouring panels are linked too"
    return f"{says}."


def _made(plan: Plan) -> str:
    by_axis: dict[str | None, list[str]] = {}
    for logical, axis in plan.rules.items():
        by_axis.setdefault(axis, []).append(logical)
    mesh = "".join(
        f'<tr><th scope="row">{_axes(name)}</th><td class="n">{size:,}</td>'
        f"<td>{escape(', '.join(by_axis.get(name, [])) or '-')}</td></tr>"
        for name, size in plan.mesh.items()
    )
    if None in by_axis:
        mesh += (
            '<tr><th scope="row">not split</th><td></td>'
            f"<td>{escape(', '.join(by_axis[None]))}</td></tr>"
        )
    versions = ", ".join(f"{name} {v}" for name, v in plan.versions.items())
    inputs = "".join(f"<li><code>{escape(text)}</code></li>" for text in plan.inputs)
    return (
        '<section class="card"><h3>Mesh and rules</h3><table><thead><tr>'
        '<th scope="col">axis</th><th scope="col" class="n">size</th>'
        f'<th scope="col">splits</th></tr></thead><tbody>{mesh}</tbody></table>'
        f"<h4>Global batch</h4><ul>{inputs}</ul><h4>Made by</h4>"
        f'<p class="quiet">Traced in {plan.trace_seconds:.1f} s, compiled in '
        f"{plan.compile_seconds:.1f} s, with {units.size(plan.host_bytes)} of the "
        f"planning machine's memory. {escape(versions)}. Key "
        f"<code>{escape(plan.key)}</code>.</p></section>"
    )


# -- small pieces ------------------------------------------------------------------

Part = tuple[str, str, float]


def _bar(parts: Iterable[Part], scale: float, css: str = "", shown=units.size) -> str:
    """Parts beside each other; `scale` is the whole width."""
    parts = [part for part in parts if part[2] > 0]
    words = ", ".join(f"{label} {shown(value)}" for _, label, value in parts)
    spans = "".join(
        f'<span class="{"unasked" if key.endswith("!") else ""}" style="width:'
        f'{100 * value / scale:.3f}%;--c:var(--{key.rstrip("!")})" '
        f'title="{escape(f"{label}: {shown(value)}")}"></span>'
        for key, label, value in parts
    )
    return (
        f'<div class="bar {css}" role="img" aria-label="{escape(words)}">{spans}</div>'
    )


def _collective_part(part: Communication) -> Part:
    key = part.kind if part.kind in KINDS else "other"
    label = f"{part.count:,} {part.kind} over {part.axis or '-'}"
    return (key, label, part.bytes) if part.asked else (f"{key}!", label, part.bytes)


def _memory_parts(plan: Plan) -> list[Part]:
    return [(s.key, s.label, s.bytes) for s in grouping.memory_segments(plan)]


def _axis_names(parts: Sequence[Communication]) -> list[str]:
    return list(dict.fromkeys(part.axis for part in parts))


def _axes(axis: str) -> str:
    return f'<span class="axis">{escape(axis or "-")}</span>'


def _times(count: int, what: str) -> str:
    return f' <span class="quiet">{count:,} {what}</span>' if count > 1 else ""


def _note(text: str, css: str) -> str:
    return f'<div class="note {css}">{escape(text)}</div>'


def _indented(name: str) -> str:
    return "&emsp;" * ((len(name) - len(name.lstrip())) // 2) + escape(name.strip())


def _badge(plan: Plan) -> str:
    if not plan.fits:
        return f'<span class="badge no">{escape(verdict(plan))}</span>'
    css = "yes" if _capacity(plan) else "open"
    return f'<span class="badge {css}">{escape(verdict(plan))}</span>'


def _name(plan: Plan) -> str:
    return f"{plan.model}, {plan.mode}, on {plan.topology}"


def _mesh_text(plan: Plan) -> str:
    return " \u00d7 ".join(f"{axis} {size:,}" for axis, size in plan.mesh.items())


def _needed(plan: Plan) -> float:
    if plan.out_of_memory is not None:
        return plan.out_of_memory.needed
    return plan.memory.total if plan.memory else 0


def _capacity(plan: Plan) -> float | None:
    if plan.out_of_memory is not None:
        return plan.out_of_memory.capacity
    return plan.memory.capacity if plan.memory else None


def _of_capacity(plan: Plan) -> str:
    capacity = _capacity(plan)
    if not capacity:
        return "the host's"
    return f"{units.percent(_needed(plan), capacity)} of {units.size(capacity)}"
