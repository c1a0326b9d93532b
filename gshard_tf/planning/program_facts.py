"""Reads FLOPs, communication and step time off a compiled program."""

from collections.abc import Mapping, Sequence
from typing import Any

from gshard_tf.compat.jax_hlo import compiled_as_text
from gshard_tf.hlo import parser
from gshard_tf.hlo.collectives import collectives
from gshard_tf.hlo.flops import flops_by_operation
from gshard_tf.hlo.layer_names import LayerNames
from gshard_tf.planning.chips import Topology
from gshard_tf.planning.records import StepTime
from gshard_tf.planning.reshards import ReshardClassifier, summarize_communication
from gshard_tf.planning.roofline import Interconnect, step_time
from gshard_tf.spmd.program import SpmdProgram


def program_facts(
    program: SpmdProgram | None,
    topology: Topology,
    layers: LayerNames,
    classifier: ReshardClassifier,
    loops: Mapping[str, int | None],
) -> dict[str, Any]:
    """Returns the fields of a plan that the compiled program determines."""
    if program is None:
        return {
            "flops": None,
            "flops_by_layer": {},
            "bytes_accessed": None,
            "communication": [],
            "reshards": [],
            "time": None,
            "unknown_loops": [name for name, n in loops.items() if n is None],
        }
    module = parser.parse(compiled_as_text(program.compiled))
    by_layer: dict[str, float] = {}
    for op_name, flops in flops_by_operation(module, loops).items():
        layer = layers.layer_of(op_name)
        by_layer[layer] = by_layer.get(layer, 0.0) + flops
    total = sum(by_layer.values())
    cost = program.compiled.cost_analysis() or {}
    communication = collectives(module, loops)
    seconds: Sequence[float] = [0.0] * len(communication)
    time_: StepTime | None = None
    if topology.chip is not None:
        links = Interconnect(topology, topology.chip)
        seconds = [links.seconds(c) for c in communication]
        time_ = step_time(
            topology,
            topology.chip,
            total,
            cost.get("bytes accessed", 0.0),
            sum(c.runs * s for c, s in zip(communication, seconds, strict=True)),
            cost.get("optimal_seconds"),
        )
    summary, reshards = summarize_communication(
        communication, layers, classifier, seconds
    )
    return {
        "flops": total,
        "flops_by_layer": by_layer,
        "bytes_accessed": cost.get("bytes accessed"),
        "communication": summary,
        "reshards": reshards,
        "time": time_,
        "unknown_loops": module.unknown_loops(loops),
    }


def uncounted_loops(loops: Sequence[str], layers: LayerNames) -> list[str]:
    """Returns a warning about loops whose number of iterations is not known."""
    if not loops:
        return []
    where = sorted({layers.layer_of(name) or name for name in loops})
    return [
        f"How often the loops in {', '.join(where)} turn depends on values, so that "
        "what is in them counts once."
    ]
