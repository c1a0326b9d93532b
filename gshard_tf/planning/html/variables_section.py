"""Sections of the page about variables, devices, and the origin of a plan."""

from html import escape

from gshard_tf.planning import summaries, units
from gshard_tf.planning.html import elements
from gshard_tf.planning.html.weight_map import weight_map
from gshard_tf.planning.plan import Plan
from gshard_tf.planning.records import Weight
from gshard_tf.planning.text import hardware


def variables_section(plan: Plan, number: int) -> str:
    groups = summaries.group_similar(
        plan.weights, lambda w: w.path, lambda w: (w.shape, w.layout, w.dtype, w.role)
    )
    groups.sort(key=lambda group: -sum(w.bytes_per_core for w in group.items))
    map_names: dict[tuple, str] = {}
    lines = []
    for group in groups:
        first: Weight = group.items[0]
        map_name = map_names.setdefault(
            (first.shape, first.layout), str(len(map_names))
        )
        lines.append(_weight_row(plan, group, map_name))
    figures = "".join(
        f'<div data-map="{name}">{weight_map(shape, layout, plan.mesh)}</div>'
        for (shape, layout), name in map_names.items()
    )
    roles = {w.role for w in plan.weights}
    options = "".join(
        f'<option value="{role}"{" selected" if role == "weight" else ""}>'
        f"{summaries.ROLE_NAMES[role]}</option>"
        for role in summaries.ROLES
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


def _weight_row(plan: Plan, group: summaries.SimilarGroup, map_name: str) -> str:
    first: Weight = group.items[0]
    whole = sum(w.bytes for w in group.items)
    core = sum(w.bytes_per_core for w in group.items)
    replicas = summaries.replicas(plan, first)
    parts = plan.num_devices // replicas
    each = "Each of them: " if len(group.items) > 1 else ""
    caption = (
        f"{each}{first.dtype} {units.dims(first.shape)}, {units.size(first.bytes)}, "
        + (
            f"in {parts:,} parts of {units.size(first.bytes_per_core)}, each on "
            f"{replicas:,} of {plan.num_devices:,} cores."
            if parts > 1
            else f"whole on each of the {plan.num_devices:,} cores."
        )
    )
    names = [w.path for w in group.items]
    layout = " ".join(
        elements.axis(axis) if axis else '<span class="quiet">-</span>'
        for axis in first.layout
    )
    rules = list(dict.fromkeys(w.rule for w in group.items))
    rule = rules[0] if len(rules) == 1 else f"{rules[0]}, and others"
    return (
        f'<tr data-map="{map_name}" data-role="{escape(first.role)}" '
        f'data-name="{escape(group.name)}" data-names="{escape(chr(10).join(names))}" '
        f'data-count="{len(names)}" data-bytes="{whole}" data-core="{core}" '
        f'data-says="{escape(caption)}"><th scope="row"><button type="button" '
        f'class="pick">{escape(group.name)}</button></th>'
        f"{elements.cell(f'{len(names):,}', 'number')}"
        f"{elements.cell(units.size(whole), 'whole')}"
        f"{elements.cell(units.size(core), 'on a core')}"
        f"{elements.cell(units.dims(first.shape), 'shape', 'mono')}"
        f'<td data-head="split over">{layout}</td>'
        f"{elements.cell(rule, 'decided by', 'quiet')}</tr>"
    )


def devices_section(plan: Plan) -> str:
    facts = ""
    if plan.chip is not None:
        chip = plan.chip
        per = chip["devices"]
        facts = (
            f'<p class="quiet">A chip {escape(str(chip["name"]))}: '
            f"{chip['flops'] / 1e12:,.0f} TFLOP/s, {units.size(chip['hbm_bytes'])} at "
            f"{units.size(chip['hbm_bandwidth'])}/s, links of "
            f"{units.size(chip['link_bandwidth'])}/s in each direction"
            + (f"; its {per} cores share them" if per > 1 else "")
            + ".</p>"
        )
    return (
        f'<section class="card"><h3>Devices: {escape(hardware(plan))}</h3>'
        f"{facts}</section>"
    )


def origin_section(plan: Plan) -> str:
    by_axis: dict[str | None, list[str]] = {}
    for logical, axis in plan.rules.items():
        by_axis.setdefault(axis, []).append(logical)
    mesh = "".join(
        f'<tr><th scope="row">{elements.axis(name)}</th><td class="n">{size:,}</td>'
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
