"""Memory of a TPU core and gathers of a step: TensorFlow's TPUStrategy and ours.

    python -m benchmarks.tpu_storage [--experts 8] [--steps 3] [--json]

The translator of `gshard_examples.translation`, on a v5e-8 that is not there, one
replica over its 8 cores, under TensorFlow's own `TPUStrategy` in SPMD mode and under
`gshard_tf.tpu_strategy`. Both train the same steps from the same weights: traced by
the strategy, lowered by TensorFlow's TPU bridge, partitioned by XLA, run on 8 CPU
devices. Printed:

* bytes of weights and optimizer slots per core, summed over the variables of a core;
* all-gathers in the partitioned program of a step, and the bytes that they bring;
* the largest difference of any weight after the steps, and how far any has moved.

Each side runs in a process of its own. No time is measured: a CPU's says nothing here.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import types
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")

import numpy as np

from benchmarks.harness.command_line import make_parser

SIDES = ("default", "ours")
SLICE = (2, 4, 1, 1)
BATCH, LENGTH = 16, 16


def default_strategy() -> Any:
    """TensorFlow's own, as its documentation says to make it."""
    import tensorflow as tf

    from gshard_tf.testing.tpu.synthetic_slice import SyntheticTPU

    tpu = SyntheticTPU(SLICE)
    assignment = tf.tpu.experimental.DeviceAssignment.build(
        tpu.topology, computation_shape=list(SLICE), num_replicas=1
    )
    strategy = tf.distribute.TPUStrategy(
        tpu,
        experimental_device_assignment=assignment,
        experimental_spmd_xla_partitioning=True,
    )
    # Else one handle stands for the copies of all cores, which saves time at each call.
    # The copies are the same, and the simulation gives each core its own.
    strategy._enable_packed_variable_in_eager_mode = False
    return strategy


def run_side(side: str, experts: int, steps: int, weights_file: str) -> dict[str, Any]:
    """Trains one side, and looks at its variables and its program."""
    import keras
    import tensorflow as tf

    import gshard_tf

    gshard_tf.request_cpu_devices(int(np.prod(SLICE)))
    from gshard_examples.translation.model import make_model
    from gshard_examples.translation.settings import Settings
    from gshard_tf.hlo.collectives import collectives
    from gshard_tf.testing.tpu.simulated_fit import SimulatedStep, core_variables
    from gshard_tf.testing.tpu.synthetic_slice import SyntheticTPU

    mesh = gshard_tf.create_mesh({"expert": int(np.prod(SLICE))}, "TPU")
    rules = gshard_tf.AxisRules.default(mesh)
    if side == "ours":
        tpu = SyntheticTPU(SLICE)
        strategy = gshard_tf.tpu_strategy(tpu, mesh, rules, tpu.topology)
    else:
        strategy = default_strategy()
    settings = Settings(experts=experts)
    keras.utils.set_random_seed(1)
    with strategy.scope():
        vocabulary = types.SimpleNamespace(size=settings.vocab_size)
        model = make_model(settings, vocabulary)
        model.optimizer.build(model.trainable_variables)

    rng = np.random.default_rng(0)
    ids = rng.integers(3, settings.vocab_size, [3, BATCH, LENGTH]).astype("int32")
    batch = tuple(tf.constant(x) for x in ids)
    batch = ((batch[0], batch[1]), batch[2])
    with strategy.scope():
        model._symbolic_build(data_batch=batch)  # as `fit` does before it traces

    def train_step(batch):
        # The same annotations on both sides: what differs is where variables lie.
        with gshard_tf.use_mesh(mesh, rules):
            return model.train_step(batch)

    state = [v.value for v in model.variables + model.optimizer.variables]
    variables = state + [v.value for v in model.metrics_variables]
    step = SimulatedStep(strategy, train_step, batch, variables)
    gathers = [c for c in collectives(step.program.as_text()) if c.kind == "all-gather"]

    def weights_now() -> list[np.ndarray]:
        with strategy.scope():  # without it TensorFlow's own cannot be read
            return [
                keras.ops.convert_to_numpy(v.value) for v in model.trainable_variables
            ]

    start = weights_now()
    for _ in range(steps):
        logs = step(batch)
    weights = weights_now()
    np.savez(weights_file, *weights)
    return {
        "bytes_per_core": sum(
            max(
                part.shape.num_elements() * part.dtype.size
                for part in core_variables(v)
            )
            for v in state
        ),
        "all_gathers": sum(c.times for c in gathers),
        "all_gather_bytes": sum(c.times * c.bytes for c in gathers),
        "loss": float(logs["loss"]),
        "max_abs_weight_move": largest_difference(weights, start),
    }


def largest_difference(some: list[np.ndarray], others: list[np.ndarray]) -> float:
    pairs = zip(some, others, strict=True)
    return max(float(np.max(np.abs(a - b))) for a, b in pairs)


def measure(experts: int, steps: int) -> dict[str, Any]:
    """Both sides, each in its own process."""
    report: dict[str, Any] = {"experts": experts, "cores": int(np.prod(SLICE))}
    with tempfile.TemporaryDirectory() as folder:
        weights = {}
        for side in SIDES:
            file = os.path.join(folder, f"{side}.npz")
            command = [sys.executable, "-m", "benchmarks.tpu_storage"]
            command += ["--side", side, "--weights", file]
            command += ["--experts", str(experts), "--steps", str(steps)]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
            if done.returncode:
                raise RuntimeError(f"The side {side!r} failed; see above.")
            result = json.loads(done.stdout.strip().splitlines()[-1])
            report |= {f"{name}_{side}": value for name, value in result.items()}
            with np.load(file) as saved:
                weights[side] = [saved[name] for name in saved.files]
    report["max_abs_weight_diff"] = largest_difference(*weights.values())
    return report


def table(result: dict[str, Any]) -> str:
    lines = [
        f"{result['experts']} experts on {result['cores']} cores",
        f"{'':28}{'TensorFlow':>14}{'ours':>14}",
    ]
    for name in ("bytes_per_core", "all_gathers", "all_gather_bytes"):
        values = "".join(f"{result[f'{name}_{side}']:>14,}" for side in SIDES)
        lines.append(f"{name.replace('_', ' '):28}{values}")
    lines.append(
        f"largest difference of weights: {result['max_abs_weight_diff']:.1e}, "
        f"moved by up to {result['max_abs_weight_move_ours']:.1e}"
    )
    return "\n".join(lines)


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--weights", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        result = run_side(options.side, options.experts, options.steps, options.weights)
        print(json.dumps(result))
        return
    result = measure(options.experts, options.steps)
    print(json.dumps(result) if options.json else table(result))


if __name__ == "__main__":
    main()
