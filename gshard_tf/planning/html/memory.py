"""What fills the memory of a core, and what is too much for it."""

from html import escape

from gshard_tf.planning import summaries, units
from gshard_tf.planning.html import markup
from gshard_tf.planning.plan import Plan


def too_much(plan: Plan) -> str:
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
            f"{markup.bar([('temporary', b.shape, b.bytes)], oom.capacity)}</td></tr>"
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


def filled(plan: Plan) -> str:
    segments = parts(plan)
    if not segments:
        return ""
    capacity = plan.capacity
    total = plan.needed
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
        bar = markup.bar(segments, total or 1, "tall")
        closer = f'<p class="quiet">Only what is used:</p>{bar}'
    lines = "".join(
        f'<tr><th scope="row"><span class="key" style="--c:var(--{key})"></span>'
        f'{escape(label)}</th><td class="n">{units.size(value)}</td>'
        f'<td class="n">{units.percent(value, capacity or scale)}</td></tr>'
        for key, label, value in segments
    )
    return (
        '<section class="card"><h3>Memory of a core</h3>'
        f'<div class="memory">{markup.bar(segments, scale, "tall")}{limit}</div>'
        f"{closer}"
        f'<table style="margin-top:14px"><tbody>{lines}</tbody><tfoot><tr>'
        f'<th scope="row">sum</th><td class="n">{units.size(total)}</td>'
        f'<td class="n">{units.percent(total, capacity or scale)}</td></tr></tfoot>'
        "</table></section>"
    )


def parts(plan: Plan) -> list[markup.Part]:
    return [(s.key, s.label, s.bytes) for s in summaries.memory_segments(plan)]
