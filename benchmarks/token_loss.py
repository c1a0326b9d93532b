"""The translator's training step with Keras's loss and metrics, and with ours.

    python -m benchmarks.token_loss [--json] [--quick]

The model is the translator's default (M = 128, V = 8192), a batch is 2048 positions,
and a step counts the cross-entropy, the negative log-likelihood and the accuracy. The
sides take turns, on one device and on 8 partitions; a figure is the median of rounds.
Processor time is that of all threads: on a machine that others use too, it says more
than the time that passes.
"""

import os
import time
import types
import warnings
from collections.abc import Callable
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import tensorflow as tf

import gshard_tf
from benchmarks.harness import timing
from benchmarks.harness.command_line import circumstances, make_parser, say, show
from gshard_examples.translation.model import make_model
from gshard_examples.translation.settings import Settings
from gshard_examples.translation.vocabulary import PAD
from keras_layers import NegativeLogLikelihood, TokenAccuracy, TokenCrossentropy

LENGTH = 16  # the shorter of the translator's buckets


def _keras() -> dict[str, Any]:
    metrics = keras.metrics
    return {
        "loss": keras.losses.SparseCategoricalCrossentropy(True, ignore_class=PAD),
        "weighted_metrics": [
            metrics.SparseCategoricalCrossentropy(from_logits=True, name="nll"),
            metrics.SparseCategoricalAccuracy(name="token_accuracy"),
        ],
    }


def _ours() -> dict[str, Any]:
    return {
        "loss": TokenCrossentropy(ignore_class=PAD),
        "weighted_metrics": [NegativeLogLikelihood(), TokenAccuracy()],
    }


def _keras_loss() -> dict[str, Any]:
    return {"loss": _keras()["loss"]}


def _our_loss() -> dict[str, Any]:
    return {"loss": TokenCrossentropy(ignore_class=PAD)}


SIDES: dict[str, Callable[[], dict[str, Any]]] = {
    "keras": _keras,
    "ours": _ours,
    "keras, loss alone": _keras_loss,
    "ours, loss alone": _our_loss,
}


def measure(partitions: int, rounds: int, steps: int, sizes: dict) -> dict[str, Any]:
    """Milliseconds, temporary memory and ratios of the sides."""
    settings = Settings(partitions=partitions, **sizes)
    rows = settings.batch_tokens // LENGTH
    rng = np.random.default_rng(0)
    ids = rng.integers(PAD + 1, settings.vocab_size, [3, rows, LENGTH]).astype("int32")
    batch = ((ids[0], ids[1]), ids[2])
    dataset = tf.data.Dataset.from_tensors(batch).repeat(steps)
    calls, result = {}, {}
    for name, arguments in SIDES.items():
        keras.utils.set_random_seed(0)
        mesh = gshard_tf.create_mesh({"expert": partitions})
        strategy = gshard_tf.SpmdStrategy(mesh)
        with strategy.scope():
            model = make_model(
                settings, types.SimpleNamespace(size=sizes["vocab_size"])
            )
            model.compile(model.optimizer, **arguments())
        history = model.fit(dataset, verbose=0).history
        (program,) = strategy.programs
        memory = program.compiled.memory_analysis()
        result[f"{name}: temporary MB a device"] = round(
            memory.temp_size_in_bytes / 2**20, 1
        )
        result[f"{name}: loss"] = round(history["loss"][0], 5)
        calls[name] = lambda model=model: model.fit(dataset, verbose=0)
    processor: dict[str, list[float]] = {name: [] for name in SIDES}
    counted = {name: _counting(call, processor[name]) for name, call in calls.items()}
    elapsed = timing.alternate(counted, rounds, warm_up=0)  # compiled above
    for kind, times in (("elapsed", elapsed), ("processor", processor)):
        result |= {f"{kind}, {k}": v for k, v in _figures(times, steps).items()}
    return result


def _counting(call: Callable[[], Any], seconds: list[float]) -> Callable[[], None]:
    """Returns `call` that also appends the processor time that it took."""

    def counted() -> None:
        start = time.process_time()
        call()
        seconds.append(time.process_time() - start)

    return counted


def _figures(times: dict[str, list[float]], steps: int) -> dict[str, float]:
    result = {
        f"{name}: ms a step": round(1e3 * timing.median(times, name) / steps, 1)
        for name in SIDES
    }
    result["ours / keras"] = round(timing.ratio(times, "ours", "keras"), 3)
    result["ours / keras, loss alone"] = round(
        timing.ratio(times, "ours, loss alone", "keras, loss alone"), 3
    )
    result["metrics / step, keras"] = round(
        1 - timing.ratio(times, "keras, loss alone", "keras"), 3
    )
    result["metrics / step, ours"] = round(
        1 - timing.ratio(times, "ours, loss alone", "ours"), 3
    )
    return result


def main() -> None:
    options = make_parser(__doc__, "a tiny model, two rounds").parse_args()
    gshard_tf.request_cpu_devices(8)
    start = time.perf_counter()
    rounds, steps, sizes = 9, 4, {"vocab_size": 8192}
    if options.quick:
        rounds, steps = 2, 1
        sizes = {
            "vocab_size": 64,
            "model_dim": 16,
            "hidden_dim": 16,
            "batch_tokens": 128,
        }
    warnings.filterwarnings("ignore", message=".*shuffle=True.*")
    result = {}
    for partitions in (1, 8):
        say(f"partitions: {partitions}")
        found = measure(partitions, rounds, steps, sizes)
        result[f"partitions: {partitions}"] = found
        say(str(found))
    show(result | circumstances(start, options.quick), options.json)


if __name__ == "__main__":
    main()
