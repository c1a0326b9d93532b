"""HTML elements that the sections of the page share."""

from collections.abc import Callable, Iterable
from html import escape

from gshard_tf.planning import units
from gshard_tf.planning.plan import Plan
from gshard_tf.planning.text import verdict

#: Color, label and size of a part of a bar. A color that ends in "!" is striped.
Part = tuple[str, str, float]


def bar(
    parts: Iterable[Part],
    scale: float,
    css: str = "",
    format_: Callable[[float], str] = units.size,
) -> str:
    """Returns a bar of adjacent parts; `scale` is the value of its whole width."""
    parts = [part for part in parts if part[2] > 0]
    words = ", ".join(f"{label} {format_(value)}" for _, label, value in parts)
    spans = "".join(
        f'<span class="{"unasked" if key.endswith("!") else ""}" style="width:'
        f'{100 * value / scale:.3f}%;--c:var(--{key.rstrip("!")})" '
        f'title="{escape(f"{label}: {format_(value)}")}"></span>'
        for key, label, value in parts
    )
    return (
        f'<div class="bar {css}" role="img" aria-label="{escape(words)}">{spans}</div>'
    )


def cell(text: str, head: str = "", css: str = "n") -> str:
    """Returns a cell of a table, with the head of its column for narrow screens."""
    named = f' data-head="{escape(head)}"' if head else ""
    return f'<td class="{css}"{named}>{escape(text)}</td>'


def axis(axis: str) -> str:
    return f'<span class="axis">{escape(axis or "-")}</span>'


def times(count: int, what: str) -> str:
    return f' <span class="quiet">{count:,} {what}</span>' if count > 1 else ""


def note(text: str, css: str) -> str:
    return f'<div class="note {css}">{escape(text)}</div>'


def indented(name: str) -> str:
    return "&emsp;" * ((len(name) - len(name.lstrip())) // 2) + escape(name.strip())


def badge(plan: Plan) -> str:
    if not plan.fits:
        return f'<span class="badge no">{escape(verdict(plan))}</span>'
    css = "yes" if plan.bytes_available else "open"
    return f'<span class="badge {css}">{escape(verdict(plan))}</span>'


def title(plan: Plan) -> str:
    return f"{plan.model}, {plan.mode}, on {plan.topology}"


def mesh_text(plan: Plan) -> str:
    return " \u00d7 ".join(f"{axis} {size:,}" for axis, size in plan.mesh.items())
