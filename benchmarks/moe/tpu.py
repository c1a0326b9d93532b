"""FLOPs of the layer in the TPU compiler's program, over those of the experts.

With capacity, and with dropless dispatch over those of the routed rows.

    python -m benchmarks.moe.tpu [--json] [--topology NAME ...]

Compile-only: forward and backward of one `MoELayer` (top-2, capacity factor 2) with as
many experts and groups as the slice has cores, each group 2,048 tokens, float32
weights; at the paper's width (M = 1024, H = 8192) by default. The dropless layer stands
behind a dense one, so that its tokens have gradients, too, and has one and four experts
a core. Its FLOPs are those that its kernels state: of all tiles that they visit under
an even load. Needs libtpu (`pip install 'gshard-tf[aot]'`), no TPU; nothing is run.
"""

import collections
import json
import os
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
# The process computes nothing, and must not look for a TPU.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import keras
import tensorflow as tf

import gshard_tf
from benchmarks.harness import machine
from benchmarks.harness.command_line import make_parser
from gshard_tf.runtime.device_arrays import Placement
from gshard_tf.runtime.devices import topology_devices
from gshard_tf.spmd import lowering
from gshard_tf.spmd.executable import compile_step
from gshard_tf.spmd.step import Step
from keras_layers import MoELayer

GROUP_SIZE = 2048


def compile_layer(topology: str, model_dim: int, hidden_dim: int) -> dict:
    devices = topology_devices(topology)
    cores = len(devices)
    mesh = gshard_tf.create_mesh({"expert": cores})
    strategy = gshard_tf.SpmdStrategy(mesh)
    with strategy.scope():
        layer = MoELayer(cores, hidden_dim, seed=0)
        layer.build((cores, GROUP_SIZE, model_dim))

    def forward_and_backward(x, cotangent):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = layer(x, training=True)
            loss = tf.reduce_sum(y * cotangent) + tf.add_n(layer.losses)
        weights = [weight.value for weight in layer.trainable_weights]
        d_x, *d_weights = tape.gradient(loss, [x, *weights])
        # Weights are brought forward, so that nothing of their gradients is idle.
        for weight, gradient in zip(weights, d_weights, strict=True):
            weight.assign_sub(gradient)
        return d_x

    spec = tf.TensorSpec((cores, GROUP_SIZE, model_dim), tf.float32)
    start = time.perf_counter()
    placeholders = [tf.zeros([1]), tf.zeros([1])]  # what is a tensor; shapes follow
    step = Step(strategy.extended, forward_and_backward, (tuple(placeholders), {}))
    lowered = lowering.lower(*step.trace([spec, spec]))
    traced = time.perf_counter()
    program = compile_step(strategy.extended.layouts, lowered, Placement(mesh, devices))
    compiled = time.perf_counter()
    flops = program.compiled.cost_analysis()["flops"]
    # Two products of [C, M] x [M, H], forward and both gradients, of all groups; each
    # core has one expert.
    capacity = 2 * GROUP_SIZE // cores
    analytic = 3 * 2 * 2 * cores * capacity * model_dim * hidden_dim
    memory = program.compiled.memory_analysis()
    kinds = collections.Counter(c.kind for c in program.collectives())
    return {
        "topology": topology,
        "cores": cores,
        "experts": cores,
        "capacity": capacity,
        "flops_over_experts": flops / analytic,
        "collectives": dict(kinds),
        "argument_mb": memory.argument_size_in_bytes / 1e6,
        "temporary_mb": memory.temp_size_in_bytes / 1e6,
        "trace_s": traced - start,
        "compile_s": compiled - traced,
    }


def compile_dropless(
    topology: str, model_dim: int, hidden_dim: int, experts_per_core: int
) -> dict:
    cores = len(topology_devices(topology))
    experts = cores * experts_per_core

    def build() -> keras.Model:
        inputs = keras.Input((GROUP_SIZE, model_dim))
        x = keras.layers.Dense(model_dim)(inputs)
        layer = MoELayer(
            experts,
            hidden_dim,
            router={"kind": "top_k", "k": 2},
            dispatcher="dropless",
            seed=0,
            name="moe",
        )
        model = keras.Model(inputs, layer(x), name="model")
        model.compile("sgd", "mse")
        return model

    spec = tf.TensorSpec((cores, GROUP_SIZE, model_dim), tf.float32)
    plan = gshard_tf.plan(build, topology, batch=(spec, spec), cache=False)
    flops = sum(
        count
        for layer, count in plan.flops_by_layer.items()
        if layer.startswith("model/moe/experts")
    )
    # Of a core: two choices a token, two products, forward and both gradients.
    analytic = 2 * GROUP_SIZE * 3 * 2 * 2 * model_dim * hidden_dim
    kinds = ("all-to-all", "all-reduce", "all-gather", "collective-permute")
    counts = {kind: plan.count(kind, "model/moe") for kind in kinds}
    return {
        "topology": topology,
        "cores": cores,
        "experts": experts,
        "flops_over_routed": flops / analytic,
        "collectives": {kind: count for kind, count in counts.items() if count},
        "temporary_mb": plan.memory.temporaries / 1e6,
        "trace_s": plan.trace_seconds,
        "compile_s": plan.compile_seconds,
    }


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--topology", nargs="+", default=["v5e:2x4", "v3:4x4"])
    parser.add_argument("--model-dim", type=int, default=1024)
    parser.add_argument("--hidden-dim", type=int, default=8192)
    options = parser.parse_args()
    gshard_tf.request_cpu_devices(64)
    rows = [
        compile_layer(name, options.model_dim, options.hidden_dim)
        for name in options.topology
    ]
    dropless = [
        compile_dropless(name, options.model_dim, options.hidden_dim, each)
        for name in options.topology
        for each in (1, 4)
    ]
    if options.json:
        print(
            json.dumps(
                {"rows": rows, "dropless": dropless, "machine": machine.describe()}
            )
        )
        return
    for row in [*rows, *dropless]:
        print(row)


if __name__ == "__main__":
    main()
