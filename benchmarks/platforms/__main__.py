"""Platforms without a TPU or a GPU: what compiles; and what `fit` adds to a step.

    python -m benchmarks.platforms [--json] [--quick] [--topology NAME]

Three parts:

* table: operations of TensorFlow and layers of Keras, lowered by TensorFlow for the
  CPU as `SpmdStrategy` does, then compiled for a TPU core by libtpu (the extra `aot`)
  and exported for CUDA. Nothing is run, and nothing is compiled for a GPU;
* `overhead_ms_per_step`: of `fit`, on a stand-in device that takes 20 ms a step; and
  `cpu_ms_per_step`: the CPU time of a step of `fit`, and of one in plain Keras;
* `host_bytes_over_shards`: host memory of a training process over the bytes of its own
  shards, for 1, 2 and 4 processes, and at its peak; and the difference of the two. On
  CPU devices, so 1 would be the shards alone.
"""

import os
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
# The process compiles for a TPU, and must not look for one.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import gshard_tf
from benchmarks.harness.command_line import circumstances, make_parser, say, show
from benchmarks.platforms.host_memory import host_bytes_over_shards
from benchmarks.platforms.overhead import cpu_per_step, overhead
from benchmarks.platforms.table import table

PARTS = "table", "overhead", "memory"


def main() -> None:
    parser = make_parser(__doc__, quick="one case of eight, 64 steps, a small layer")
    parser.add_argument("--topology", default="v5e:1x1", help="a TPU slice")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    options = parser.parse_args()
    gshard_tf.request_cpu_devices(1)
    start, result = time.perf_counter(), {}
    if "memory" in options.parts:
        hidden_dim = 64 if options.quick else 32768
        result["host_bytes_over_shards"] = {}
        for processes in (1, 2, 4):
            found = host_bytes_over_shards(processes, hidden_dim)
            result["host_bytes_over_shards"][f"processes={processes}"] = found
            say(f"{processes} processes: {found}")
    if "overhead" in options.parts:
        quick = {"steps": 64, "rounds": 1} if options.quick else {}
        result["overhead_ms_per_step"] = overhead(**quick)
        result["cpu_ms_per_step"] = cpu_per_step(**quick)
    if "table" in options.parts:
        result.update(table(options.topology, every=8 if options.quick else 1))
    result.update(circumstances(start, options.quick))
    show(result, options.json)


if __name__ == "__main__":
    main()
