"""Sections of the page about memory, step time and FLOPs by layer."""

from collections.abc import Sequence
from html import escape

from gshard_tf.planning import summaries, units
from gshard_tf.planning.html import elements
from gshard_tf.planning.plan import Plan


def out_of_memory_section(plan: Plan) -> str:
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
            f"{elements.cell(b.layer or '-', 'layer', 'mono')}"
            f"{elements.cell(b.operation or '-', 'operation', 'mono')}"
            f'{elements.cell(units.size(b.bytes), "size")}<td class="wide">'
            f"{elements.bar([('temporary', b.shape, b.bytes)], oom.capacity)}</td></tr>"
            for b in buffers
        )
        what = (
            "The compiler named no buffers: the largest tensors as written, whole"
            if oom.as_written
            else "The largest buffers"
        )
        out += (
            f"<h4>{what}, compared with the memory of a core</h4>"
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


def memory_section(plan: Plan) -> str:
    segments = memory_parts(plan)
    if not segments:
        return ""
    capacity = plan.bytes_available
    total = plan.bytes_needed
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
        bar = elements.bar(segments, total or 1, "tall")
        closer = f'<p class="quiet">Only what is used:</p>{bar}'
    lines = "".join(
        f'<tr><th scope="row"><span class="key" style="--c:var(--{key})"></span>'
        f'{escape(label)}</th><td class="n">{units.size(value)}</td>'
        f'<td class="n">{units.percent(value, capacity or scale)}</td></tr>'
        for key, label, value in segments
    )
    return (
        '<section class="card"><h3>Memory of a core</h3>'
        f'<div class="memory">{elements.bar(segments, scale, "tall")}{limit}</div>'
        f"{closer}"
        f'<table style="margin-top:14px"><tbody>{lines}</tbody><tfoot><tr>'
        f'<th scope="row">sum</th><td class="n">{units.size(total)}</td>'
        f'<td class="n">{units.percent(total, capacity or scale)}</td></tr></tfoot>'
        "</table></section>"
    )


def memory_parts(plan: Plan) -> list[elements.Part]:
    return [(s.key, s.label, s.bytes) for s in summaries.memory_segments(plan)]


def step_time_section(plan: Plan) -> str:
    if not plan.fits:
        return ""
    out = '<section class="card"><h3>Time of a step: an estimate, not a measurement'
    t = plan.time
    if t is None:
        why = "None for a CPU, whose cores are virtual."
        return f'{out}</h3><p class="quiet">{why}</p></section>'
    values = [
        ("matmuls at the chip's peak", t.compute, "work"),
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
        f"{elements.bar([(key, name, value)], longest, '', units.seconds)}</td>"
        f'<td class="n">{units.seconds(value)}</td></tr>'
        for name, value, key in values
    )
    assumed = "".join(f"<li>{escape(text)}</li>" for text in t.assumptions)
    return (
        f"{out}</h3><table><tbody>{lines}</tbody></table>"
        f'<h4>It assumes</h4><ul class="quiet">{assumed}</ul></section>'
    )


def flops_section(plan: Plan) -> str:
    if not plan.flops_by_layer:
        return ""
    groups = summaries.group_similar(plan.flops_by_layer.items(), lambda item: item[0])
    sums = [
        (group.name, len(group.items), sum(value for _, value in group.items))
        for group in groups
    ]
    sums.sort(key=lambda item: -item[2])
    table = _layer_table(sums, plan.flops)
    out = f'<section class="card"><h3>FLOPs by layer</h3>{table}'
    if any(count > 1 for _, count, _ in sums):
        each = [(name, 1, value) for name, value in plan.flops_by_layer.items()]
        out += (
            f"<details><summary>Each of the {len(each)} layers</summary>"
            f"{_layer_table(each, plan.flops)}</details>"
        )
    return f"{out}</section>"


def _layer_table(sums: Sequence[tuple[str, int, float]], whole: float | None) -> str:
    largest = max(value for _, _, value in sums) or 1
    lines = "".join(
        f'<tr><th scope="row"><code>{escape(name or "(no layer)")}</code>'
        f'{elements.times(count, "layers")}</th><td class="wide">'
        f"{elements.bar([('work', name, value)], largest, '', units.flops)}</td>"
        f"{elements.cell(units.flops(value))}"
        f"{elements.cell(units.percent(value, whole) if whole else '')}</tr>"
        for name, count, value in sums
    )
    return f'<div class="scroll"><table><tbody>{lines}</tbody></table></div>'
