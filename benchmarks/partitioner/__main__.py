"""Layers and layouts: what is sent for each, against what one derives by hand.

    python -m benchmarks.partitioner [--json] [--case TEXT] [--topology v5e:2x4]
                                     [--partitioner shardy|gspmd]

For each case of a layer, a layout and a mesh of eight devices: whether two train steps
equal plain Keras on one device (`max_rel`), the collectives of a train step in bytes
that a device receives (`expected` by hand, `found` in the program), and the memory of a
device over an equal share (`memory_over_share`) and over what the layout needs by hand
(`memory_over_ideal`). With `--topology`, the same of a TPU slice of eight chips:
compiled for it, not run (needs libtpu). `LARGE=1` before the command takes sizes of a
model where layers have tokens, and runs nothing.

`--partitioner` chooses between XLA's two, of which jax takes Shardy by default;
`compile_seconds`, for eight CPU devices, is to compare them.
"""

import json
import os
import time
import warnings
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import jax

import gshard_tf
from benchmarks.harness.command_line import circumstances, make_parser, say
from benchmarks.partitioner import measure
from benchmarks.partitioner.cases import IS_LARGE, SEQUENCES, Case
from benchmarks.partitioner.grids import GRIDS
from benchmarks.partitioner.images import IMAGES

CASES = [*SEQUENCES, *GRIDS, *IMAGES]


def row(case: Case, topology: str | None) -> dict[str, Any]:
    """Returns the result of a case.

    Args:
        case: The case.
        topology: A TPU slice of 8 chips to compile for as well; None: none.
    """
    split = measure.planned(case, "cpu:8", 8)
    whole = measure.planned(case, "cpu:1", 1)
    found = measure.communication(split)
    result: dict[str, Any] = {
        "case": case.name,
        "mesh": dict(case.mesh),
        "max_rel": None if IS_LARGE else measure.max_rel(case),
        "expected": dict(case.expected),
        "found": found,
        "as_expected": measure.is_as_expected(case.expected, found),
        **measure.memory(case, whole, split),
        "compile_seconds": round(split.compile_seconds, 2),
    }
    if topology is not None:
        name = topology.partition(":")[0]
        split = measure.planned(case, topology, 8)
        whole = measure.planned(case, f"{name}:1x1", 1)
        result[topology] = {
            "found": measure.communication(split),
            **measure.memory(case, whole, split),
        }
    return result


def main() -> None:
    parser = make_parser(__doc__, "two cases")
    parser.add_argument("--case", default="", help="only cases whose name has this")
    parser.add_argument("--topology", help="a TPU slice of 8 chips, such as v5e:2x4")
    parser.add_argument("--partitioner", choices=["shardy", "gspmd"], default="shardy")
    arguments = parser.parse_args()
    start = time.perf_counter()
    is_shardy = arguments.partitioner == "shardy"
    jax.config.update("jax_use_shardy_partitioner", is_shardy)
    gshard_tf.request_cpu_devices(8)
    # Keras warns that the losses of a model without a batch axis are not averaged.
    warnings.filterwarnings("ignore", category=UserWarning)
    cases = [case for case in CASES if arguments.case in case.name]
    for case in cases[:2] if arguments.quick else cases:
        say(case.name)
        result = row(case, arguments.topology)
        if arguments.json:
            print(json.dumps(result), flush=True)
        else:
            _print(result)
    say(json.dumps(circumstances(start, arguments.quick)))


def _print(result: dict[str, Any]) -> None:
    mark = "" if result["as_expected"] else "  NOT AS EXPECTED"
    difference = result["max_rel"]
    lines = [
        f"{result['case']}{mark}",
        f"  max_rel {'not run' if difference is None else format(difference, '.1e')}, "
        f"memory {result['memory_over_ideal']} of the ideal",
    ]
    for kind in sorted({*result["expected"], *result["found"]}):
        found = result["found"].get(kind, {"count": 0, "bytes": 0})
        expected = result["expected"].get(kind, 0)
        lines.append(
            f"  {kind:20s} {found['count']:3d}  {found['bytes']:>12,} bytes"
            f"  expected {expected:>12,}"
        )
    print("\n".join(lines), flush=True)


if __name__ == "__main__":
    main()
