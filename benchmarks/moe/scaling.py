"""Time per token as the number of experts grows, at a fixed number of tokens.

    python -m benchmarks.moe.scaling [--json] [--quick] [--groups G] [--plot PATH]

Forward and backward of `MoELayer` and of its experts' matmuls alone, for E from 8 to
256, all in one run under TensorFlow's jit, sides alternating. FLOPs do not depend on
E; weights and their gradients grow with it, so the matmuls themselves slow down once
an expert has few rows: 64 groups of 1,024 tokens give each of 256 experts 512 rows
(`--groups 8`: 64). Beside them the bytes of what routing adds: by index (ours) and
as one-hot tensors [G, S, E, C] (the paper's form), from their shapes, and the
temporaries of the whole compiled step in either form, read off XLA's own analysis.

About ten minutes on two cores. `--quick` runs tiny sizes, whose figures say nothing
but that the script runs.
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
    layer_side,
    layer_step,
    matmul_side,
    one_partition,
    program_of,
    tokens_and_gradients,
)

GOAL = 1.3
SHAPE = Shape(model_dim=256, hidden_dim=1024, groups=64, group_size=1024)
EXPERTS = (8, 16, 32, 64, 128, 256)
TINY = Shape(model_dim=16, hidden_dim=32, groups=2, group_size=32)
TINY_EXPERTS = (4, 8)
CHOICES = 2  # K


def routing_bytes(shape: Shape) -> dict[str, int]:
    """Bytes of what tells where tokens go, by index and as one-hot tensors."""
    choices = shape.groups * shape.group_size * CHOICES
    slots = shape.groups * shape.experts * shape.capacity
    # Per choice: expert, slot, weight (4 bytes each), kept (1), its place among all
    # slots (4); per slot: the choice that is in it (4).
    one_hot = 4 * shape.groups * shape.group_size * shape.experts * shape.capacity
    return {
        "index_bytes": 17 * choices + 4 * slots,
        "one_hot_bytes": 2 * one_hot,
        "gates_bytes": 4 * shape.groups * shape.group_size * shape.experts,
    }


def temporary_bytes(shape: Shape, dispatcher: str) -> int:
    """Returns the temporary memory of the compiled step, besides its arguments."""
    strategy = one_partition()
    with strategy.scope():
        _, step = layer_step(shape, dispatcher=dispatcher)
        program, _ = program_of(strategy, step, tokens_and_gradients(shape))
    return program.compiled.memory_analysis().temp_size_in_bytes


def measure(base: Shape, experts: tuple[int, ...], rounds: int) -> dict[str, Any]:
    shapes = {e: dataclasses.replace(base, experts=e) for e in experts}
    sides = {}
    for e, shape in shapes.items():
        sides[f"layer {e}"] = layer_side(shape, "jit")
        sides[f"matmuls {e}"] = matmul_side(shape, "jit")
    times = timing.alternate(sides, rounds)
    first = experts[0]
    rows = []
    for e, shape in shapes.items():
        row = {
            "experts": e,
            "rows_per_expert": shape.rows,
            "microseconds_per_token": 1e6
            * timing.median(times, f"layer {e}")
            / shape.tokens,
            "over_fewest_experts": timing.ratio(times, f"layer {e}", f"layer {first}"),
            "matmuls_over_fewest_experts": timing.ratio(
                times, f"matmuls {e}", f"matmuls {first}"
            ),
            "over_gemm": timing.ratio(times, f"layer {e}", f"matmuls {e}"),
            **routing_bytes(shape),
        }
        rows.append(row)
    del sides
    for row in rows:
        shape = shapes[row["experts"]]
        for name in ("index", "einsum"):
            row[f"temporary_bytes_{name}"] = temporary_bytes(shape, name)
        say(f"{row}")
    growth = max(row["over_fewest_experts"] for row in rows)
    floor = max(row["matmuls_over_fewest_experts"] for row in rows)
    return {
        "growth": growth,
        "matmuls_growth": floor,
        "goal": GOAL,
        "tokens": base.tokens,
        "over_gemm": statistics.median(row["over_gemm"] for row in rows),
        "rows": rows,
    }


def draw(result: dict[str, Any], path: str) -> None:
    """Time and bytes over E, in one picture."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = result["rows"]
    experts = [row["experts"] for row in rows]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4))
    left.plot(experts, [r["over_fewest_experts"] for r in rows], "o-", label="MoELayer")
    left.plot(
        experts,
        [r["matmuls_over_fewest_experts"] for r in rows],
        "s--",
        label="the experts' matmuls alone",
    )
    left.axhline(GOAL, color="gray", linewidth=0.8, label=f"goal, {GOAL}")
    left.set(
        xscale="log",
        xlabel="experts",
        ylabel=f"time per token, {experts[0]} experts = 1",
        title=f"Forward and backward, {result['tokens']} tokens",
        ylim=(0, None),
    )
    for name, label in (
        ("index_bytes", "index maps (ours)"),
        ("gates_bytes", "gates [G, S, E]"),
        ("one_hot_bytes", "one-hot [G, S, E, C], two"),
    ):
        right.plot(experts, [r[name] / 1e6 for r in rows], "o-", label=label)
    right.set(
        xscale="log",
        yscale="log",
        xlabel="experts",
        ylabel="megabytes",
        title="Tensors of the routing",
    )
    for axes in (left, right):
        axes.set_xticks(experts, [str(e) for e in experts])
        axes.minorticks_off()
        axes.legend()
        axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main() -> None:
    parser = make_parser(__doc__, quick="tiny sizes, a few rounds")
    parser.add_argument(
        "--groups", type=int, default=SHAPE.groups, help="G, default 64"
    )
    parser.add_argument("--plot", metavar="PATH", help="where to draw the picture")
    options = parser.parse_args()
    gshard_tf.request_cpu_devices(1)
    start = time.perf_counter()
    if options.quick:
        result = measure(TINY, TINY_EXPERTS, rounds=2)
    else:
        shape = dataclasses.replace(SHAPE, groups=options.groups)
        result = measure(shape, EXPERTS, rounds=3)
    result |= circumstances(start, options.quick)
    if options.plot:
        draw(result, options.plot)
    if options.json:
        print(json.dumps(result))
        return
    print("    E  us/token  growth  matmuls'  over_gemm  index MB  one-hot MB")
    for row in result["rows"]:
        print(
            f"{row['experts']:5d} {row['microseconds_per_token']:9.1f} "
            f"{row['over_fewest_experts']:7.2f} "
            f"{row['matmuls_over_fewest_experts']:9.2f} {row['over_gemm']:10.3f} "
            f"{row['index_bytes'] / 1e6:9.2f} {row['one_hot_bytes'] / 1e6:11.1f}"
        )
    print(f"growth {result['growth']:.2f}, goal {GOAL}; machine: {result['machine']}")


if __name__ == "__main__":
    main()
