"""Layouts that a search finds for the paper's models, against the paper's own layout.

    python -m benchmarks.layout_search [--json] [--quick] [--models NAMES] [--plans N]

Each row is a train step of one of the paper's models (see `benchmarks.paper.table`) on
the TPU v3 slice that the paper trained it on: `gshard_tf.find_layout` looks for a mesh
and rules, and the paper's layout (`batch`, `group` and `expert` over one axis of all
cores) is planned as well. Both are compared by one estimate, that of a step without
overlap of communication and computation. Needs libtpu (`pip install 'gshard-tf[aot]'`),
no TPU.

Models: 16E, 128E, 512E and 2048E (experts; 16E is not the paper's) and T (dense). Each
has four layers, one dense and one MoE block in encoder and decoder each, so that a plan
takes a minute or two: all layers of a kind have the same layout, and the number of
layers decides only whether it fits.

One JSON object per row. `step_ms` and `paper_step_ms` are the estimates; `ratio` is the
found one over the paper's; at most 1: the found layout is at least as good.
"""

import os
import time
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import keras
import tensorflow as tf

import gshard_tf
from benchmarks.harness.command_line import make_parser, say, show
from benchmarks.paper.table import LENGTH, TOPOLOGIES, transformer

EXPERTS = {"16E": 16, "128E": 128, "512E": 512, "2048E": 2048, "T": 0}
BLOCKS = 2  # of encoder and decoder each


def run(name: str, plans: int, quick: bool) -> dict[str, Any]:
    """One row."""
    experts = EXPERTS[name]
    cores = experts or 128
    topology = TOPOLOGIES[cores]
    length = 128 if quick else LENGTH
    ids = tf.TensorSpec([cores, length], tf.int32)
    batch = ((ids, ids), ids)

    def build() -> keras.Model:
        return transformer(experts, BLOCKS, deep=False, low=False)

    start = time.perf_counter()
    found = gshard_tf.find_layout(build, topology, batch, max_plans=plans, progress=say)
    seconds = time.perf_counter() - start
    say(str(found))
    # The paper's layout; named as the search names it, so that a plan is found again.
    paper_rules = gshard_tf.AxisRules(
        dict.fromkeys(("batch", "group", "expert") if experts else ("batch",), "data")
    )
    paper = gshard_tf.plan(
        build, topology, {"data": cores}, paper_rules, batch, progress=say
    )
    row: dict[str, Any] = {
        "model": name,
        "topology": topology,
        "weights": paper.parameters,
        "candidates": len(found.trials),
        "planned": len(found.planned),
        "not_planned": dict(found.reasons),
        "search_s": seconds,
        "paper_gb": paper.bytes_needed / 1e9,
        "paper_step_ms": paper.time and 1e3 * paper.time.without_overlap,
    }
    best = found.best
    if best is not None:
        row |= {
            "layout": str(best.layout),
            "gb": best.bytes_needed / 1e9,
            "step_ms": 1e3 * best.seconds,
            "ratio": paper.time and best.seconds / paper.time.without_overlap,
        }
    return row


def main() -> None:
    parser = make_parser(__doc__, quick="rows of 128 tokens")
    parser.add_argument("--models", default="128E", help="comma-separated")
    parser.add_argument("--plans", type=int, default=6, help="at most, of a search")
    options = parser.parse_args()
    names = options.models.split(",")
    for name in names:
        if name not in EXPERTS:
            parser.error(f"--models are {', '.join(EXPERTS)}. Received: {name!r}")
    for name in names:
        row = run(name, options.plans, options.quick)
        show(row, options.json)


if __name__ == "__main__":
    main()
