"""How long a step takes at least, and which layers have its products."""

from collections.abc import Sequence
from html import escape

from gshard_tf.planning import summaries, units
from gshard_tf.planning.html import markup
from gshard_tf.planning.plan import Plan


def duration(plan: Plan) -> str:
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
        f"{markup.bar([(key, name, value)], longest, '', units.seconds)}</td>"
        f'<td class="n">{units.seconds(value)}</td></tr>'
        for name, value, key in values
    )
    assumed = "".join(f"<li>{escape(text)}</li>" for text in t.assumptions)
    return (
        f"{out}</h3><table><tbody>{lines}</tbody></table>"
        f'<h4>It assumes</h4><ul class="quiet">{assumed}</ul></section>'
    )


def products(plan: Plan) -> str:
    if not plan.flops_by_layer:
        return ""
    groups = summaries.alike(plan.flops_by_layer.items(), lambda item: item[0])
    sums = [
        (group.name, len(group.items), sum(value for _, value in group.items))
        for group in groups
    ]
    sums.sort(key=lambda item: -item[2])
    out = f'<section class="card"><h3>Products by layer</h3>{_table(sums, plan.flops)}'
    if any(count > 1 for _, count, _ in sums):
        each = [(name, 1, value) for name, value in plan.flops_by_layer.items()]
        out += (
            f"<details><summary>Each of the {len(each)} layers</summary>"
            f"{_table(each, plan.flops)}</details>"
        )
    return f"{out}</section>"


def _table(sums: Sequence[tuple[str, int, float]], whole: float | None) -> str:
    largest = max(value for _, _, value in sums) or 1
    lines = "".join(
        f'<tr><th scope="row"><code>{escape(name or "(no layer)")}</code>'
        f'{markup.times(count, "layers")}</th><td class="wide">'
        f"{markup.bar([('work', name, value)], largest, '', units.flops)}</td>"
        f'<td class="n">{units.flops(value)}</td>'
        f'<td class="n">{units.percent(value, whole) if whole else ""}</td></tr>'
        for name, count, value in sums
    )
    return f'<div class="scroll"><table><tbody>{lines}</tbody></table></div>'
