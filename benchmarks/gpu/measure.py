"""The MoE layer on a machine with jax and no TensorFlow: how near to its own matmuls.

    python -m benchmarks.gpu.measure FOLDER [--json] [--rows 0,2,5] [--rounds 10]

FOLDER is what `benchmarks.gpu.export` saved elsewhere. For each shape, forward
and backward of the layer (top-2, capacity factor 2.0) by index and by one-hot dispatch,
and of the peers that are installed here (`benchmarks.gpu.peers`), one by one:

* `share`: the FLOPs of the experts' six products a second, as a share of this machine's
  own rate in large matmuls of the same type, measured in the same run (goal: 0.6);
* `memory`: arguments, results and temporaries of the compiled program; and, where the
  device tells, the most that was allocated.

It imports neither TensorFlow nor Keras, and runs on CPUs too.
"""

import json
import os
import pathlib
import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np

from benchmarks.gpu.peers import PEERS
from benchmarks.harness import timing
from benchmarks.harness.command_line import circumstances, make_parser, say
from gshard_tf import export
from gshard_tf.export import LoadedProgram, Tensor

# Before jax starts: the torch peers need memory of the same GPU.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

GOAL = 0.6
SECONDS = 20.0  # of timing, for each side of a row


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("folder", type=pathlib.Path, help="of the saved programs")
    parser.add_argument("--rows", help="numbers of the shapes to measure: 0,2,5")
    parser.add_argument(
        "--rounds", type=int, default=10, help="timings of each side, at most"
    )
    options = parser.parse_args()
    start = time.perf_counter()
    index = json.loads((options.folder / "index.json").read_text())
    chosen = range(len(index["rows"]))
    if options.rows:
        chosen = [int(number) for number in options.rows.split(",")]
    import jax

    kind = jax.devices()[0]
    rate = matmul_rate(index["policy"], 1024 if kind.platform == "cpu" else 8192)
    say(f"{kind.device_kind}: {rate / 1e12:.3f} TFLOP/s in {index['policy']} matmuls")
    rows = []
    for number in chosen:
        rows.append(row(options.folder, index, number, rate, options.rounds))
        say(f"row {number}: {rows[-1]}")
    result = {
        "device": kind.device_kind,
        "platform": kind.platform,
        "policy": index["policy"],
        "matmul_tflops": rate / 1e12,
        "goal": GOAL,
        "rows": rows,
        **circumstances(start, index["grid"] == "quick"),
    }
    print(json.dumps(result) if options.json else table(result))


def matmul_rate(policy: str, size: int) -> float:
    """FLOPs per second of square matmuls: what the machine can do in that type."""
    import jax
    import jax.numpy as jnp

    a, b = (
        jax.random.normal(jax.random.key(i), (size, size), jnp.dtype(policy))
        for i in range(2)
    )
    multiply = jax.jit(jnp.matmul)
    multiply(a, b).block_until_ready()
    times = []
    for _ in range(10):
        start = time.perf_counter()
        multiply(a, b).block_until_ready()
        times.append(time.perf_counter() - start)
    return 2 * size**3 / statistics.median(times)


def row(
    folder: pathlib.Path,
    index: Mapping[str, Any],
    number: int,
    rate: float,
    rounds: int,
) -> dict[str, Any]:
    """One shape: one side after the other, each gone before the next is made."""
    entry = index["rows"][number]
    shape = entry["shape"]
    sides: dict[str, dict[str, Any]] = {}
    for name, file in entry["files"].items():
        sides[name] = _or_out_of_memory(partial(_program, folder / file, rounds))
        if "seconds" in sides[name]:
            flops_per_second = shape["matmul_flops"] / sides[name]["seconds"]
            sides[name]["share"] = flops_per_second / rate
    for name, peer in PEERS.items():
        missing = peer.missing()
        if missing:
            sides[name] = {"missing": missing}
        else:
            sides[name] = _or_out_of_memory(
                lambda make=peer.make: _time(make(shape, index["policy"]), rounds)
            )
    for name, side in sides.items():
        if "seconds" in side:
            side["tokens_per_second"] = shape["tokens"] / side["seconds"]
        if name != "index" and "seconds" in side and "seconds" in sides["index"]:
            side["over_index"] = side["seconds"] / sides["index"]["seconds"]
    return {"shape": shape, "sides": sides}


def _program(path: pathlib.Path, rounds: int) -> dict[str, Any]:
    program = export.load(path, mesh=1)
    return {**_time(side(program), rounds), "memory": memory(program)}


def _or_out_of_memory(measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Measures, or reports that memory was exhausted, which is a result too."""
    try:
        return measure()
    except RuntimeError as error:  # jaxlib's and torch's
        text = str(error)
        if "RESOURCE_EXHAUSTED" not in text and "out of memory" not in text:
            raise
        return {"out_of_memory": text.split("\n")[0][:200]}


def _time(run: Callable[[], object], rounds: int) -> dict[str, Any]:
    run()  # compiles
    start = time.perf_counter()
    run()
    # Peers that were not made for this device may be a hundred times slower.
    rounds = max(1, min(rounds, int(SECONDS / (time.perf_counter() - start))))
    times = timing.alternate({"it": run}, rounds, warm_up=0)
    return {"seconds": timing.median(times, "it"), "rounds": rounds}


def side(program: LoadedProgram) -> Callable[[], object]:
    """A call of the program with its state and arguments on the device."""
    import jax

    manifest = program.manifest
    rng = np.random.default_rng(0)
    state = program.put_state({t.name: _values(t, rng) for t in manifest.state})
    batch = [_values(t, rng) for t in manifest.inputs]
    current = {"batch": program.put_batch(batch), "state": state}

    def run() -> object:
        outputs, current["state"] = program(current["batch"], current["state"])
        return jax.block_until_ready(outputs)

    return run


def _values(tensor: Tensor, rng: np.random.Generator) -> np.ndarray:
    """Weights of one expert's scale, tokens and gradients of unit scale, else zeros."""
    if tensor.role not in ("weight", "input"):
        return np.zeros(tensor.shape, tensor.dtype)
    scale = tensor.shape[-2] ** -0.5 if tensor.role == "weight" else 1.0
    # One block, repeated: random numbers for 17 GB would take minutes.
    block = rng.standard_normal(1 << 20, dtype=np.float32) * np.float32(scale)
    return np.resize(block.astype(tensor.dtype), tensor.shape)


def memory(program: LoadedProgram) -> dict[str, int]:
    """Bytes of a compiled program, and the peak of the device if it tells."""
    import jax

    stats = program.compiled.memory_analysis()
    sizes = {
        "arguments": stats.argument_size_in_bytes,
        "results": stats.output_size_in_bytes,
        "shared": stats.alias_size_in_bytes,
        "temporaries": stats.temp_size_in_bytes,
    }
    sizes["program"] = (
        sizes["arguments"] + sizes["results"] + sizes["temporaries"] - sizes["shared"]
    )
    allocated = jax.devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in allocated:
        sizes["peak_so_far"] = allocated["peak_bytes_in_use"]
    return sizes


def table(result: Mapping[str, Any]) -> str:
    """The result for people."""
    lines = [
        f"{result['device']}, {result['policy']}: {result['matmul_tflops']:.3f} "
        "TFLOP/s in large matmuls",
        "",
        "| M | H | E | tokens | side | ms | share | memory, MB | over index |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for entry in result["rows"]:
        shape = entry["shape"]
        first = " | ".join(
            str(shape[key]) for key in ("model_dim", "hidden_dim", "experts", "tokens")
        )
        for name, side in entry["sides"].items():
            if "seconds" not in side:
                why = ", ".join(side.get("missing", [])) or "out of memory"
                lines.append(f"| {first} | {name} | - ({why}) | | | |")
                continue
            share = f"{side['share']:.2f}" if "share" in side else ""
            size = f"{side['memory']['program'] / 1e6:.0f}" if "memory" in side else ""
            over = f"{side['over_index']:.2f}" if "over_index" in side else ""
            lines.append(
                f"| {first} | {name} | {1e3 * side['seconds']:.1f} | {share} | {size} "
                f"| {over} |"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
