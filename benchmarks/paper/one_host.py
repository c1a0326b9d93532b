"""One process of a large run: a paper's model, built and initialized without the rest.

    python -m benchmarks.paper.one_host [--model 2048E12L:fsdp] [--process 0] [--json]

Plays one of the processes that train a model on as many cores as it has experts, eight
to a host. `SpmdStrategy` makes the model, its optimizer and their variables on the mesh
of all cores, and this process's devices get their shards of every variable, with the
numbers that plain Keras would begin with. The other processes do not exist: their
devices are there in name, and hold nothing. Nothing is compiled, and no step is run.

Everything is on CPU devices, so host memory holds the shards, too. `--model`: see
`benchmarks.paper.table`. `:fsdp` spreads dense weights over all cores; without it,
each of the eight devices has all of them.
"""

import os
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import numpy as np
import tensorflow as tf

import gshard_tf
from benchmarks.harness import memory
from benchmarks.harness.command_line import circumstances, make_parser, show
from benchmarks.paper import table
from gshard_tf.runtime.device_arrays import named_sharding, place
from gshard_tf.sharding.regions import Region, cut
from gshard_tf.spmd.keras_step import complete
from gshard_tf.spmd.variable import MeshVariable, VariableTransfer

CORES_PER_HOST = 8


class Shards(list):
    """The shards of one variable, in place of an array of all processes."""

    def is_deleted(self) -> bool:
        return False


class OneHost(VariableTransfer):
    """Places on the devices of one host what `VariableTransfer` places on all.

    Args:
        extended: Of the strategy.
        process: The number of the host.
    """

    def __init__(self, extended: Any, process: int):
        super().__init__(extended.placement, extended.layouts)
        self._mesh = extended.placement.jax_mesh
        first = process * CORES_PER_HOST
        self._own = set(self._mesh.devices.flat[first : first + CORES_PER_HOST])

    def assemble(
        self, variable: MeshVariable, read: Callable[[Region], np.ndarray]
    ) -> Shards:
        shape = tuple(variable.shape)
        sharding = named_sharding(self.layout(variable), self._mesh)
        indices = sharding.devices_indices_map(shape)
        own = {device: indices[device] for device in indices if device in self._own}
        return Shards(place(shape, own, read))


def initialize(model_name: str, process: int, quick: bool) -> dict[str, Any]:
    """Builds the model and makes the shards of one process."""
    experts, layers, low, spread = table.parse(model_name)
    gshard_tf.request_cpu_devices(experts)
    mesh = gshard_tf.create_mesh({"expert": experts})
    strategy = gshard_tf.SpmdStrategy(mesh, table.rules(spread))
    strategy.extended.transfer = OneHost(strategy.extended, process)
    before, start = memory.resident(), time.perf_counter()
    memory.reset_peak()
    ids = tf.TensorSpec([experts, table.LENGTH], tf.int32)
    blocks = 2 if quick else layers // 2
    with strategy.scope():
        model = table.transformer(experts, blocks, layers > 12 and not quick, low)
        complete(model, ((ids, ids), ids), "train")
    built, built_at = memory.resident(), time.perf_counter()
    sizes = {"weights": 0, "optimizer": 0}
    for kind, variables in (
        ("weights", model.variables),
        ("optimizer", model.optimizer.variables),
    ):
        for variable in variables:
            value = variable.value
            shards = value.device_value(
                lambda array, value=value: strategy.extended.transfer.assemble(
                    value, lambda region: cut(array, region)
                )
            )
            sizes[kind] += sum(shard.nbytes for shard in shards)
    shards_gb = sum(sizes.values()) / 1e9
    return {
        "model": model_name,
        "process": f"{process} of {experts // CORES_PER_HOST}",
        "weights": sum(int(np.prod(w.shape)) for w in model.trainable_weights),
        "whole_state_gb": sum(
            int(np.prod(v.shape)) * v.value.dtype.size
            for v in [*model.variables, *model.optimizer.variables]
        )
        / 1e9,
        "shards_of_weights_gb": sizes["weights"] / 1e9,
        "shards_of_optimizer_gb": sizes["optimizer"] / 1e9,
        "built_gb": (built - before) / 1e9,
        "host_gb": (memory.resident() - before) / 1e9,
        "peak_gb": (memory.peak() - before) / 1e9,
        "process_gb": memory.resident() / 1e9,
        "host_over_shards": (memory.resident() - before) / 1e9 / shards_gb,
        "build_s": built_at - start,
        "initialize_s": time.perf_counter() - built_at,
    }


def main() -> None:
    parser = make_parser(__doc__, quick="two blocks of each kind")
    parser.add_argument("--model", default="2048E12L:fsdp")
    parser.add_argument("--process", type=int, default=0, help="its number")
    options = parser.parse_args()
    start = time.perf_counter()
    result = initialize(options.model, options.process, options.quick)
    show({**result, **circumstances(start, options.quick)}, options.json)


if __name__ == "__main__":
    main()
