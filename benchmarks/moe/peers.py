"""Our MoE layer beside other projects' blocks: time, memory, useful tokens a second.

    python -m benchmarks.moe.peers [--json] [--quick] [--peers NAME ...]

Forward and backward, all gradients, on the same tokens, experts and widths, float32.
Gated blocks (three matrices per expert) get two thirds of the hidden width, so that
all have as many weights and FLOPs; ours beside them is gated too.

Each block lives in a process of its own with one project in it. Where a block can run
in several ways (TensorFlow's jit or op by op; kinds of expert loops) the fastest is
taken, of theirs and of ours. The two processes then take turns. Ratios are theirs over
ours: above 1 we are ahead.

* time: median of the ratios of neighboring steps;
* memory: the most that is resident in three steps after compiling, in a new process,
  less that of the same block at a tiny size, in another new process. Weights, their
  gradients and inputs are in it; libraries and what compiling left are not;
* useful tokens per second: tokens that at least one expert took.

A peer that is not installed is listed with the command that installs it. About ten
minutes on two cores; `--quick` runs tiny sizes, whose figures say nothing but that the
script runs.

Peers that drop nothing stand beside our dropless layer, those with a capacity beside
ours with the same.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import statistics
import time
from collections.abc import Iterator
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

from benchmarks.harness import memory, served
from benchmarks.harness.command_line import circumstances, make_parser, say
from benchmarks.harness.served import Side, SideError
from benchmarks.moe.peer_blocks import (
    OUR_WAYS,
    OURS,
    PEERS,
    outputs_of,
)
from benchmarks.moe.steps import Shape

SHAPE = Shape(experts=16, model_dim=512, hidden_dim=1536, groups=4, group_size=512)
TINY = Shape(experts=4, model_dim=24, hidden_dim=48, groups=2, group_size=32)
#: Of the process whose memory is subtracted. torch's grouped products take multiples of
#: four, and gated blocks have two thirds of the width.
LEAST = Shape(experts=2, model_dim=8, hidden_dim=24, groups=1, group_size=8)


# ----------------------------------------------------------------- in the process


def serve(block: str, way: str, shape: Shape) -> None:
    """Answers "step" with seconds, "memory" with the most bytes resident in steps."""
    make = OURS[block] if block in OURS else PEERS[block].make
    side = make(shape, way)
    result = side()
    outputs = outputs_of(result)
    dispatched = float((abs(outputs).max(axis=-1) > 0).mean())
    del result, outputs
    side()

    def step() -> float:
        start = time.perf_counter()
        side()
        return time.perf_counter() - start

    def most_resident() -> int:
        memory.reset_peak()
        for _ in range(3):
            side()
        return memory.peak()

    served.serve(dispatched, {"step": step, "memory": most_resident})


# --------------------------------------------------------------- outside of it


class Block(Side):
    """A block in its process; `hello` is the share of tokens that an expert took."""

    def __init__(self, block: str, way: str, shape: Shape):
        self.way = way
        arguments = ["--serve", block, way, json.dumps(dataclasses.asdict(shape))]
        super().__init__(f"{block} ({way})", "benchmarks.moe.peers", arguments)


@contextlib.contextmanager
def fastest(block: str, ways: tuple[str, ...], shape: Shape) -> Iterator[Block]:
    """The block, running in the way in which it is fastest."""
    way = ways[0]
    if len(ways) > 1:
        trials = {}
        for way in ways:
            running = Block(block, way, shape)
            trials[way] = min(running.ask("step") for _ in range(3))
            running.close()
        say(f"{block}: seconds {trials}")
        way = min(trials, key=trials.get)
    running = Block(block, way, shape)
    try:
        yield running
    finally:
        running.close()


def memory_of(block: str, way: str, shape: Shape) -> int:
    """Bytes that steps of a block need beyond those of `LEAST`, in new processes."""
    peaks = []
    for each in (shape, LEAST):
        running = Block(block, way, each)
        try:
            peaks.append(running.ask("memory"))
        finally:
            running.close()
    return peaks[0] - peaks[1]


def compare(theirs: Block, ours: Block, shape: Shape, rounds: int) -> dict[str, Any]:
    times: dict[str, list[float]] = {"theirs": [], "ours": []}
    for i in range(rounds):
        sides = [("theirs", theirs), ("ours", ours)]
        for name, block in reversed(sides) if i % 2 else sides:
            times[name].append(block.ask("step"))
    pairs = zip(times["theirs"], times["ours"], strict=True)
    result = {
        "time_ratio": statistics.median(a / b for a, b in pairs),
        "way": theirs.way,
        "our_way": ours.way,
    }
    for name, block in (("theirs", theirs), ("ours", ours)):
        seconds = statistics.median(times[name])
        result[f"{name}_seconds"] = seconds
        result[f"{name}_useful_tokens_per_second"] = (
            block.hello * shape.tokens / seconds
        )
    return result


def run(names: list[str], shape: Shape, rounds: int) -> dict[str, Any]:
    rows: dict[str, Any] = {}
    missing: dict[str, str] = {}
    failed: dict[str, str] = {}
    for name in names:
        packages = PEERS[name].missing()
        if packages:
            missing[name] = "pip install " + " ".join(packages)
    for ours_name in OURS:
        selected = [n for n in names if n not in missing and PEERS[n].ours == ours_name]
        if not selected:
            continue
        with fastest(ours_name, OUR_WAYS, shape) as ours:
            our_bytes = memory_of(ours_name, ours.way, shape)
            for name in selected:
                peer = PEERS[name]
                try:
                    with fastest(name, peer.ways, shape) as theirs:
                        row = compare(theirs, ours, shape, rounds)
                        their_bytes = memory_of(name, theirs.way, shape)
                except SideError as error:
                    failed[name] = str(error)
                    say(f"{name} failed: {error}")
                    continue
                rows[name] = row | {
                    "memory_ratio": their_bytes / our_bytes,
                    "theirs_megabytes": their_bytes / 1e6,
                    "ours_megabytes": our_bytes / 1e6,
                    "beside": ours_name,
                    "work": peer.work,
                }
                say(f"{name}: {rows[name]}")
    return {"peers": rows, "not_installed": missing, "failed": failed}


def main() -> None:
    parser = make_parser(__doc__, quick="tiny sizes, a few rounds")
    parser.add_argument("--peers", nargs="+", choices=list(PEERS), default=list(PEERS))
    parser.add_argument("--serve", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        block, way, shape = options.serve
        serve(block, way, Shape(**json.loads(shape)))
        return
    start = time.perf_counter()
    shape = TINY if options.quick else SHAPE
    result = run(options.peers, shape, rounds=2 if options.quick else 5)
    result["shape"] = dataclasses.asdict(shape)
    result |= circumstances(start, options.quick)
    if options.json:
        print(json.dumps(result))
        return
    print("peer                    time  memory  tokens/s theirs   ours  beside our")
    for name, row in result["peers"].items():
        print(
            f"{name:22s} {row['time_ratio']:5.2f} {row['memory_ratio']:7.2f} "
            f"{row['theirs_useful_tokens_per_second']:16.0f} "
            f"{row['ours_useful_tokens_per_second']:6.0f}  {row['beside']}"
        )
    for name, command in result["not_installed"].items():
        print(f"{name:22s} is not installed: {command}")
    for name, error in result["failed"].items():
        print(f"{name:22s} failed: {error.splitlines()[-1] if error else ''}")
    print(f"machine: {result['machine']}")


if __name__ == "__main__":
    main()
