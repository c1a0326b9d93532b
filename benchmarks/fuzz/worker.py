"""The process in which cases run: jobs on standard input, events on standard output.

A job is a JSON line `{"seed", "name", "shrink"}`. A case may end the process; whoever
watches knows by the last event how far it came.
"""

import contextlib
import json
import os
import sys
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
# The reference has gradients of grouped convolutions by oneDNN alone.
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")

import gshard_tf
from benchmarks.fuzz import shrinking
from benchmarks.fuzz.case import make_case


def run(job: dict[str, Any], tell: Any) -> None:
    """Runs one case and tells how far it has come."""
    try:
        case = make_case(job["seed"], job["name"])
        program = case.program()
        inputs = program["make_inputs"]()
        want = program["run_plain"](program["function"], program["make_layers"], inputs)
    except Exception as error:
        # TensorFlow alone, on one device, does not run it: no case.
        tell(event="end", verdict="unusable", said=f"{error!r}"[:300])
        return
    tell(event="case", script=case.script())
    outcome = shrinking.verdict(program, want)
    tell(event="found", **outcome)
    if job["shrink"] and outcome["verdict"] in ("wrong", "error"):
        case = shrinking.shrink(case, outcome["verdict"])
    tell(event="end", **outcome, script=case.script())


def main() -> None:
    gshard_tf.request_cpu_devices(8)
    # What TensorFlow prints must not stand between the events.
    events = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def tell(**event: Any) -> None:
        with contextlib.suppress(BrokenPipeError):
            print(json.dumps(event), file=events, flush=True)

    tell(event="ready")
    for line in sys.stdin:
        run(json.loads(line), tell)


if __name__ == "__main__":
    main()
