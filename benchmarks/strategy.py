"""SpmdStrategy measured: its numbers, its program, its cost.

    python -m benchmarks.strategy [--json]

Three parts, about five minutes on two quiet cores:

* parity: 20 steps of `fit` on 1, 2 and 8 partitions against plain Keras, for five
  optimizers, with and without dropout, batches that divide (16 rows) and batches that
  do not (13 rows): the largest relative difference of any loss, metric, weight or
  optimizer slot. It runs in a process of its own, compiled without LLVM's
  optimizations, which take longer than the steps;
* program: the collectives of an 8-way `Transformer` train step, and the share of
  expert weights and their slots that one device holds;
* cost: a step of `fit` over a bare call of its program, and one partition over
  Keras's own `jit_compile=True`; sides alternate, medians of ratios.
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import tensorflow as tf

import gshard_tf
from benchmarks.harness import machine
from benchmarks.harness.command_line import make_parser, say
from keras_layers import Dropout, MoELayer, Transformer

OPTIMIZERS: dict[str, Callable[[], keras.optimizers.Optimizer]] = {
    "sgd": lambda: keras.optimizers.SGD(0.05, momentum=0.9),
    "adam": lambda: keras.optimizers.Adam(1e-3),
    "adamw": lambda: keras.optimizers.AdamW(1e-3),
    "adafactor": lambda: keras.optimizers.Adafactor(1e-2),
    "lion": lambda: keras.optimizers.Lion(1e-4),
}


def strategy_over(partitions: int) -> gshard_tf.SpmdStrategy:
    return gshard_tf.SpmdStrategy(gshard_tf.create_mesh({"expert": partitions}))


# ---------------------------------------------------------------------------- parity


def _parity_run(partitions: int, optimizer: str, rate: float) -> dict[str, np.ndarray]:
    """20 steps; partitions 0 is plain Keras."""
    keras.utils.set_random_seed(1)
    rng = np.random.default_rng(0)
    rows = 16 if rate else 13
    x = rng.normal(size=(4 * rows, 8, 16)).astype("float32")
    y = rng.normal(size=(4 * rows, 8, 4)).astype("float32")
    scope = (
        strategy_over(partitions).scope() if partitions else contextlib.nullcontext()
    )
    with scope:
        inputs = keras.Input((8, 16))
        hidden = keras.layers.Dense(16, name="inner")(inputs)
        hidden = Dropout(rate, seed=3)(hidden)
        hidden = keras.layers.Add()(
            [hidden, MoELayer(8, 32, dropout=rate, seed=4, name="moe")(hidden)]
        )
        model = keras.Model(inputs, keras.layers.Dense(4, name="outer")(hidden))
        model.compile(OPTIMIZERS[optimizer](), "mse", metrics=["mae"])
    history = model.fit(x, y, batch_size=rows, epochs=5, shuffle=False, verbose=0)
    arrays = {f"log {k}": np.array(v) for k, v in history.history.items()}
    for i, variable in enumerate(model.variables + model.optimizer.variables):
        arrays[f"{i} {variable.path}"] = keras.ops.convert_to_numpy(variable)
    return arrays


def relative_difference(a: np.ndarray, b: np.ndarray) -> float:
    """max |a - b| / max |b|, of float64 copies."""
    a, b = np.asarray(a, "float64"), np.asarray(b, "float64")
    scale = np.abs(b).max(initial=0.0)
    difference = np.abs(a - b).max(initial=0.0)
    return float(difference / scale if scale else difference)


def parity() -> dict[str, Any]:
    worst: dict[str, float] = {}
    for optimizer in OPTIMIZERS:
        for rate in (0.0, 0.1):
            plain = _parity_run(0, optimizer, rate)
            for partitions in (1, 2, 8):
                ours = _parity_run(partitions, optimizer, rate)
                # Names differ by Keras's counters, the order does not.
                worst[f"{optimizer}, dropout {rate}, {partitions} partitions"] = max(
                    relative_difference(a, b)
                    for a, b in zip(ours.values(), plain.values(), strict=True)
                )
            say(f"parity {optimizer} dropout {rate}: {list(worst.values())[-3:]}")
    return {"parity_max_rel": max(worst.values()), "parity": worst}


# --------------------------------------------------------------------------- program

LAYERS = 2  # encoder blocks, and as many decoder blocks; every other one has experts


def program() -> dict[str, Any]:
    strategy = strategy_over(8)
    with strategy.scope():
        model = Transformer(
            128, 128, LAYERS, LAYERS, model_dim=32, hidden_dim=64, num_heads=4,
            num_experts=8, dropout=0.1, seed=0,
        )  # fmt: skip
        model.compile("adam", keras.losses.SparseCategoricalCrossentropy(True))
    ids = np.random.default_rng(0).integers(1, 128, (16, 8)).astype("int32")
    model.fit((ids, ids), ids, batch_size=16, verbose=0)
    model.evaluate((ids, ids), ids, batch_size=16, verbose=0)
    train, evaluate = strategy.programs[0], strategy.programs[-1]
    counts = {}
    for name, compiled in (("train", train), ("forward", evaluate)):
        kinds = [collective.kind for collective in compiled.collectives()]
        counts[name] = {kind: kinds.count(kind) for kind in sorted(set(kinds))}
    fractions = {
        path: local / whole
        for path, whole, local in train.argument_bytes()
        if "experts" in path
    }
    moe_layers = 2 * (LAYERS // 2)
    forward = counts["forward"].get("all-to-all", 0)
    return {
        "all_to_all_forward_per_moe_layer": forward / moe_layers,
        "all_to_all_backward_per_moe_layer": (
            counts["train"].get("all-to-all", 0) - forward
        )
        / moe_layers,
        "expert_all_gathers": counts["train"].get("all-gather", 0),
        "expert_bytes_fraction": max(fractions.values()),
        "expert_variables": len(fractions),
        "collectives": counts,
    }


# ------------------------------------------------------------------------------ cost


class _StepTimes(keras.callbacks.Callback):
    """Seconds from the first batch to the last of an epoch, per step."""

    def on_epoch_begin(self, epoch: int, logs: dict | None = None) -> None:
        self.batches = 0

    def on_train_batch_begin(self, batch: int, logs: dict | None = None) -> None:
        if not self.batches:
            self.start = time.perf_counter()
        self.batches += 1

    def on_train_batch_end(self, batch: int, logs: dict | None = None) -> None:
        self.seconds = (time.perf_counter() - self.start) / self.batches


#: A step takes about as long as one of the translation example by default.
WIDTH = 512


def _cost_model(jit: bool | str) -> keras.Model:
    keras.utils.set_random_seed(0)
    inputs = keras.Input((64, WIDTH))
    hidden = keras.layers.Dense(WIDTH)(inputs)
    hidden = keras.layers.Add()([hidden, MoELayer(8, 2 * WIDTH, seed=1)(hidden)])
    outputs = keras.layers.Dense(WIDTH)(hidden)
    model = keras.Model(inputs, outputs)
    model.compile("adam", "mse", jit_compile=jit)
    return model


def cost(rounds: int = 7, steps: int = 5) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(72, 64, WIDTH)).astype("float32")
    dataset = tf.data.Dataset.from_tensors((x, x)).repeat(steps)
    strategy = strategy_over(1)
    with strategy.scope():
        ours = _cost_model("auto")
    plain = _cost_model(True)

    def fit_step(model: keras.Model) -> float:
        times = _StepTimes()
        model.fit(dataset, verbose=0, callbacks=[times])
        return times.seconds

    fit_step(ours), fit_step(plain)  # compile
    compiled = strategy.programs[0]
    captures = [
        strategy.extended.placement.put(np.asarray(value.numpy()), layout)
        for value, layout in zip(
            compiled.step.captures, compiled.layouts.captures, strict=True
        )
    ]

    def bare_step() -> float:
        start = time.perf_counter()
        for _ in range(steps):
            outputs, updated = compiled(compiled.put_inputs([x, x]), captures)
            for i, value in zip(compiled.step.updates, updated, strict=True):
                captures[i] = value
            [np.asarray(output) for output in outputs]
        return (time.perf_counter() - start) / steps

    bare_step()
    rows = []
    for _ in range(rounds):
        rows.append((fit_step(ours), bare_step(), fit_step(ours), fit_step(plain)))
    result = {
        "fit_over_program": statistics.median(a / b for a, b, _, _ in rows),
        "one_partition_over_keras_jit": statistics.median(c / d for _, _, c, d in rows),
        "fit_less_program_ms": statistics.median(1e3 * (a - b) for a, b, _, _ in rows),
        "fit_step_s": statistics.median(c for _, _, c, _ in rows),
        "keras_jit_step_s": statistics.median(d for _, _, _, d in rows),
    }
    say(f"cost: {result}")
    return result


def parity_apart() -> dict[str, Any]:
    """`parity()` in a process of its own, with XLA's flags of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.strategy", "--parity-only"],
        env=os.environ | {"XLA_FLAGS": "--xla_backend_optimization_level=0"},
        stdout=subprocess.PIPE,
        check=True,
    )
    return json.loads(done.stdout)


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--parity-only", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    gshard_tf.request_cpu_devices(8)
    warnings.filterwarnings("ignore", message=".*shuffle=True.*")
    if options.parity_only:
        print(json.dumps(parity()))
        return
    start = time.perf_counter()
    result = cost() | program() | parity_apart()
    result["seconds"] = round(time.perf_counter() - start)
    result["machine"] = machine.describe()
    if options.json:
        print(json.dumps(result))
        return
    for key, value in result.items():
        if not isinstance(value, dict):
            print(f"{key:36s} {value:.4g}")
    print(f"{'machine':36s} {result['machine']}")


if __name__ == "__main__":
    main()
