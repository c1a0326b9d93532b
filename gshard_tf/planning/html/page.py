"""Plans as one self-contained HTML page, without a network or a server.

`plan.html.j2` is the page; here is what it computes with.
"""

import dataclasses
import functools
import importlib.resources
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jinja2
from markupsafe import Markup

from gshard_tf.hlo.collectives import KINDS
from gshard_tf.planning import compare, summaries, units
from gshard_tf.planning.html.weight_map import weight_map
from gshard_tf.planning.plan import Plan
from gshard_tf.planning.records import Communication, StepTime, Weight
from gshard_tf.planning.text import hardware, verdict


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
    name = " and ".join(dict.fromkeys(f"{p.model} on {p.topology}" for p in plans))
    return _template().render(plans=list(plans), name=name)


@functools.cache
def _template() -> jinja2.Template:
    files = importlib.resources.files(__package__)
    environment = jinja2.Environment(
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
    )
    environment.filters["collective_part"] = _collective_part
    environment.globals |= {
        "css": Markup(files.joinpath("page.css").read_text("utf-8")),
        "js": Markup(files.joinpath("page.js").read_text("utf-8")),
        "weight_map": lambda *args: Markup(weight_map(*args)),
        "indented": lambda name: Markup("&emsp;" * (_indent(name) // 2)) + name.strip(),
    }
    environment.globals |= {
        function.__name__.removeprefix("_"): function
        for function in (
            units.dims, units.flops, units.number, units.percent, units.seconds,
            units.size, compare.differences, compare.rows, hardware, verdict,
            summaries.by_kind, summaries.by_layer, summaries.names_by_axis,
            _by_each_layer, _flops_of_each, _flops_of_similar, _memory_parts,
            _mesh_text, _time_parts, _title, _variable_rows,
        )
    }  # fmt: skip
    environment.globals |= {
        "KINDS": KINDS,
        "ROLE_NAMES": summaries.ROLE_NAMES,
        "part": _Part,
    }
    return environment.from_string(files.joinpath("plan.html.j2").read_text("utf-8"))


class _Part(NamedTuple):
    """A part of a bar; its color is a variable of `page.css`."""

    color: str
    label: str
    value: float
    striped: bool = False


@dataclasses.dataclass(frozen=True)
class _VariableRow:
    """Similar variables, and the number of the map that shows them on the mesh."""

    name: str
    paths: list[str]
    first: Weight
    bytes: int
    bytes_per_core: int
    caption: str
    rule: str
    map: int


def _title(plan: Plan) -> str:
    return f"{plan.model}, {plan.mode}, on {plan.topology}"


def _mesh_text(plan: Plan) -> str:
    return " \u00d7 ".join(f"{axis} {size:,}" for axis, size in plan.mesh.items())


def _indent(name: str) -> int:
    return len(name) - len(name.lstrip())


def _memory_parts(plan: Plan) -> list[_Part]:
    return [_Part(s.key, s.label, s.bytes) for s in summaries.memory_segments(plan)]


def _time_parts(time: StepTime) -> list[_Part]:
    parts = [
        _Part("work", "matmuls at the chip's peak", time.compute),
        _Part("temporary", "memory accesses", time.hbm),
        _Part("all-to-all", "communication", time.interconnect),
        _Part("code", "at least: the longest of these", time.roofline),
        _Part("code", "without overlap", time.without_overlap),
    ]
    if time.compiler is not None:
        parts.append(_Part("other", "the compiler's own estimate", time.compiler))
    return parts


def _collective_part(part: Communication) -> _Part:
    number = f"{part.count:,}" if part.count else f"part of {part.shared:,}"
    return _Part(
        part.kind if part.kind in KINDS else "other",
        f"{number} {part.kind} over {part.axis or '-'}",
        part.bytes,
        striped=not part.asked,
    )


def _flops_of_each(plan: Plan) -> list[tuple[str, int, float]]:
    return [(name, 1, value) for name, value in plan.flops_by_layer.items()]


def _flops_of_similar(plan: Plan) -> list[tuple[str, int, float]]:
    """Returns name, number of layers and FLOPs; the most FLOPs first."""
    groups = summaries.group_similar(plan.flops_by_layer.items(), lambda item: item[0])
    sums = [(g.name, len(g.items), sum(value for _, value in g.items)) for g in groups]
    return sorted(sums, key=lambda item: -item[2])


def _by_each_layer(parts: Sequence[Communication]) -> list[summaries.LayerTotal]:
    """Returns collectives by layer, in order of appearance."""
    order = {layer: i for i, layer in enumerate(dict.fromkeys(p.layer for p in parts))}
    ordered = sorted(parts, key=lambda part: order[part.layer])
    return [
        summaries.LayerTotal(layer, 1, list(of_layer))
        for layer, of_layer in itertools.groupby(ordered, key=lambda part: part.layer)
    ]


def _variable_rows(plan: Plan) -> list[_VariableRow]:
    """Returns similar variables together; the most bytes on a core first."""
    groups = summaries.group_similar(
        plan.weights, lambda w: w.path, lambda w: (w.shape, w.layout, w.dtype, w.role)
    )
    groups.sort(key=lambda group: -sum(w.bytes_per_core for w in group.items))
    maps: dict[Any, int] = {}
    rows = []
    for group in groups:
        first: Weight = group.items[0]
        rules = list(dict.fromkeys(w.rule for w in group.items))
        rows.append(
            _VariableRow(
                name=group.name,
                paths=[w.path for w in group.items],
                first=first,
                bytes=sum(w.bytes for w in group.items),
                bytes_per_core=sum(w.bytes_per_core for w in group.items),
                caption=("Each of them: " if len(group.items) > 1 else "")
                + _caption(plan, first),
                rule=rules[0] if len(rules) == 1 else f"{rules[0]}, and others",
                map=maps.setdefault((first.shape, first.layout), len(maps)),
            )
        )
    return rows


def _caption(plan: Plan, weight: Weight) -> str:
    replicas = summaries.replicas(plan, weight)
    shards = plan.num_devices // replicas
    what = f"{weight.dtype} {units.dims(weight.shape)}, {units.size(weight.bytes)}, "
    if shards == 1:
        return f"{what}whole on each of the {plan.num_devices:,} cores."
    return (
        f"{what}in {shards:,} parts of {units.size(weight.bytes_per_core)}, each on "
        f"{replicas:,} of {plan.num_devices:,} cores."
    )
