"""Speed of the MoE layer compared with the bare matmuls of its experts.

    python -m benchmarks.moe.limit [--json] [--quick]

Forward and backward of `MoELayer` (top-2, capacity factor 2.0, index dispatch,
training) over the same batched products of the experts alone, in one run, sides
alternating, medians of ratios:

* limit: M=512, H=2048, E=32, 4096 tokens in 4 groups, float32, under TensorFlow's jit
  (`over_gemm`), in a one-partition program of `SpmdStrategy` (`over_gemm_program`) and
  op by op (`over_gemm_ops`); and the layer where it is fastest over the matmuls where
  those are fastest (`over_best_gemm`; torch takes part if it is installed);
* sweep: the same ratio under jit over E, M and the number of tokens;
* rest: router, dispatch, combine and metrics, each alone under jit;
* dropless: the layer with dropless dispatch, its routing forced, over batched products
  of as many rows, with even experts and where a tenth of them get half of the rows
  (`dropless_over_gemm`, the largest ratio);
* decoding: one token at a time through 64 experts, by each dispatcher, over dense
  layers of as many FLOPs, in turn, so that their weights come from memory, too
  (`decoding_over_dense`, that of dropless dispatch); and over one, whose weights a
  large cache keeps.

About 15 minutes on two cores. `--part dropless` runs one of the five. `--quick` runs
tiny sizes, whose figures say nothing but that the script runs.
"""

import dataclasses
import json
import os
import statistics
import time
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import gshard_tf
from benchmarks.harness import timing
from benchmarks.harness.command_line import circumstances, make_parser, say
from benchmarks.moe.steps import (
    Shape,
    decoding_side,
    dense_decoding_side,
    dropless_side,
    in_tensorflow,
    layer_side,
    matmul_side,
    part_steps,
    torch_installed,
)

GOAL = 1.08
RUNTIMES = ("jit", "program", "ops")
PARTS = ("limit", "rest", "sweep", "dropless", "decoding")
GEMM_RATIOS = (
    "over_gemm",
    "over_gemm_program",
    "over_gemm_ops",
    "over_best_gemm",
    "dropless_over_gemm",
    "decoding_over_dense",
)

#: The shape of the goal.
LIMIT = Shape()
#: What the sweep varies, one thing at a time.
CENTER = Shape(experts=32, model_dim=256, hidden_dim=1024)
SWEEP = {
    "experts": [8, 16, 64, 128, 256],
    "model_dim": [128, 512, 1024],
    "group_size": [256, 512, 2048],
}
TINY = Shape(experts=4, model_dim=16, hidden_dim=32, groups=2, group_size=32)
#: Two choices for each token, and as many rows in each expert's products.
DROPLESS = [Shape(experts=e, hidden_dim=1024) for e in (8, 16, 32, 64)]
DECODING = Shape(experts=64)
#: Dense layers that take turns.
LAYERS = 16
TINY_SWEEP = {"experts": [2], "group_size": [16]}


def limit(shape: Shape, rounds: int) -> dict[str, Any]:
    sides = {}
    for runtime in RUNTIMES:
        sides[f"layer {runtime}"] = layer_side(shape, runtime)
        sides[f"matmuls {runtime}"] = matmul_side(shape, runtime)
    if torch_installed():
        sides["matmuls torch"] = matmul_side(shape, "torch")
    times = timing.alternate(sides, rounds)
    seconds = {name: timing.median(times, name) for name in times}
    layer = min((n for n in seconds if n.startswith("layer")), key=seconds.get)
    matmuls = min((n for n in seconds if n.startswith("matmuls")), key=seconds.get)
    over = {r: timing.ratio(times, f"layer {r}", f"matmuls {r}") for r in RUNTIMES}
    result = {
        "over_gemm": over["jit"],
        "over_gemm_program": over["program"],
        "over_gemm_ops": over["ops"],
        "over_best_gemm": timing.ratio(times, layer, matmuls),
        "best_layer": layer,
        "best_gemm": matmuls,
        "goal": GOAL,
        "gflops_per_second": {
            name: shape.matmul_flops / 1e9 / seconds[name]
            for name in seconds
            if name.startswith("matmuls")
        },
        "seconds": seconds,
        "torch": torch_installed(),
        "shape": dataclasses.asdict(shape),
    }
    say(f"limit: {result}")
    return result


def sweep(
    center: Shape, variations: dict[str, list[int]], rounds: int
) -> list[dict[str, Any]]:
    shapes = [center]
    for field, values in variations.items():
        shapes += [dataclasses.replace(center, **{field: v}) for v in values]
    rows = []
    for shape in shapes:
        times = timing.alternate(
            {"layer": layer_side(shape, "jit"), "matmuls": matmul_side(shape, "jit")},
            rounds,
        )
        row = dataclasses.asdict(shape) | {
            "tokens": shape.tokens,
            "over_gemm": timing.ratio(times, "layer", "matmuls"),
            "layer_s": timing.median(times, "layer"),
            "matmuls_s": timing.median(times, "matmuls"),
        }
        say(f"sweep: {row}")
        rows.append(row)
    return rows


def rest(shape: Shape, rounds: int) -> dict[str, Any]:
    """Milliseconds of each part alone, forward and backward."""
    sides = {
        name: in_tensorflow(fn, arguments, jit=True)
        for name, (fn, arguments) in part_steps(shape).items()
    }
    times = timing.alternate(sides, rounds, warm_up=2)
    parts = {name: 1e3 * timing.median(times, name) for name in times}
    say(f"parts, ms: {parts}")
    return parts


def dropless(shapes: list[Shape], rounds: int) -> list[dict[str, Any]]:
    rows = []
    for shape in shapes:
        sides = {
            "even": dropless_side(shape, skewed=False),
            "skewed": dropless_side(shape, skewed=True),
            "matmuls": matmul_side(shape, "jit"),
        }
        times = timing.alternate(sides, rounds)
        row = dataclasses.asdict(shape) | {
            "even_over_gemm": timing.ratio(times, "even", "matmuls"),
            "skewed_over_gemm": timing.ratio(times, "skewed", "matmuls"),
            "matmuls_s": timing.median(times, "matmuls"),
        }
        say(f"dropless: {row}")
        rows.append(row)
    return rows


def decoding(shape: Shape, rounds: int) -> dict[str, Any]:
    sides = {
        "dense": dense_decoding_side(shape, LAYERS),
        "one dense": dense_decoding_side(shape, 1),
        "dropless": decoding_side(shape, "dropless"),
        "index": decoding_side(shape, "index"),
    }
    times = timing.alternate(sides, rounds, warm_up=2)
    row = dataclasses.asdict(shape) | {
        "dropless_over_dense": timing.ratio(times, "dropless", "dense"),
        "index_over_dense": timing.ratio(times, "index", "dense"),
        "dropless_over_one_dense": timing.ratio(times, "dropless", "one dense"),
        "dense_s": timing.median(times, "dense"),
    }
    say(f"decoding: {row}")
    return row


def main() -> None:
    parser = make_parser(__doc__, quick="tiny sizes, a few rounds")
    parser.add_argument("--part", choices=PARTS, action="append")
    options = parser.parse_args()
    gshard_tf.request_cpu_devices(1)
    start = time.perf_counter()
    quick, parts = options.quick, options.part or PARTS
    result: dict[str, Any] = {}
    if "limit" in parts:
        result |= limit(TINY if quick else LIMIT, rounds=2 if quick else 7)
    if "rest" in parts:
        result["rest_ms"] = rest(TINY if quick else LIMIT, rounds=2 if quick else 15)
    if "sweep" in parts:
        variations = TINY_SWEEP if quick else SWEEP
        rows = sweep(TINY if quick else CENTER, variations, 2 if quick else 5)
        result["sweep"] = rows
        result["sweep_median"] = statistics.median(row["over_gemm"] for row in rows)
    if "dropless" in parts:
        rows = dropless([TINY] if quick else DROPLESS, 2 if quick else 7)
        result["dropless"] = rows
        result["dropless_over_gemm"] = max(
            max(row["even_over_gemm"], row["skewed_over_gemm"]) for row in rows
        )
    if "decoding" in parts:
        row = decoding(TINY if quick else DECODING, 2 if quick else 15)
        result["decoding"] = row
        result["decoding_over_dense"] = row["dropless_over_dense"]
    result |= circumstances(start, quick)
    if options.json:
        print(json.dumps(result))
        return
    for key in GEMM_RATIOS:
        if key in result:
            print(f"{key:20s} {result[key]:.3f}")
    for name, seconds in result.get("seconds", {}).items():
        print(f"{name:20s} {seconds:.4f} s")
    for name, milliseconds in result.get("rest_ms", {}).items():
        print(f"{name:20s} {milliseconds:.2f} ms")
    print("    E     M     H  tokens  over_gemm")
    for row in result.get("sweep", []):
        print(f"{_sizes(row)}  {row['over_gemm']:9.3f}")
    for row in result.get("dropless", []):
        even, skewed = row["even_over_gemm"], row["skewed_over_gemm"]
        print(f"{_sizes(row)}  dropless: even {even:.3f}, skewed {skewed:.3f}")
    print(f"{'machine':20s} {result['machine']}")


def _sizes(row: dict[str, Any]) -> str:
    tokens = row["groups"] * row["group_size"]
    return (
        f"{row['experts']:5d} {row['model_dim']:5d} {row['hidden_dim']:5d} {tokens:7d}"
    )


if __name__ == "__main__":
    main()
