"""Tokens per second of the translator's training: packed rows against padded ones.

    python -m benchmarks.translator_throughput --data data/S [--json] [--quick]

"After" is what `gshard-translate` does. "Before" is the same model and the same
sampling with a pair in each row, padded to one of two lengths (16 and 48), with Keras's
loss and metrics, and with weight gradients as XLA orders them. A token is an id of a
source or a target; padding is none. The sides take turns, and a figure is the median of
rounds. No other library is measured here.
"""

import os
import time
from pathlib import Path
from typing import Any
from unittest import mock

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import tensorflow as tf

from benchmarks.harness import timing
from benchmarks.harness.command_line import circumstances, make_parser, say, show
from gshard_examples.translation.corpus import load_corpus
from gshard_examples.translation.model import make_model, make_strategy, scope
from gshard_examples.translation.packed_batches import PackedBatches, choose_row_lengths
from gshard_examples.translation.sampling import LanguageSampler
from gshard_examples.translation.settings import Settings
from gshard_examples.translation.tokens import TokenizedSplit, tokenize_split
from gshard_examples.translation.vocabulary import PAD, Vocabulary
from gshard_tf.spmd import program

BUCKETS = (16, 48)
Batch = tuple[Any, np.ndarray, np.ndarray]


def padded_batches(tokens: TokenizedSplit, settings: Settings, count: int):
    """Batches of one pair in each row, `[rows, bucket]` on both sides."""
    lengths = np.maximum(tokens.source_lengths, tokens.target_lengths)
    fits = np.flatnonzero(lengths <= BUCKETS[-1])
    generator = np.random.default_rng([settings.seed, 0])
    pairs = LanguageSampler(tokens, fits, settings.temperature).draw(generator)
    bucket = np.searchsorted(BUCKETS, lengths[pairs])
    chunks = []
    for number, length in enumerate(BUCKETS):
        size = round(settings.batch_tokens / length / 8) * 8
        inside = generator.permutation(pairs[bucket == number])
        whole = len(inside) // size
        chunks += [(length, rows) for rows in np.split(inside[: whole * size], whole)]
    chosen = [chunks[i] for i in generator.permutation(len(chunks))[:count]]
    return [_padded(tokens, rows, length) for length, rows in chosen]


def _padded(tokens: TokenizedSplit, rows: np.ndarray, length: int) -> Batch:
    source, target, labels = np.full([3, len(rows), length], PAD, np.int32)
    for i, row in enumerate(rows):
        ids = tokens.source[tokens.source_starts[row] : tokens.source_starts[row + 1]]
        source[i, : len(ids)] = ids
        ids = tokens.target[tokens.target_starts[row] : tokens.target_starts[row + 1]]
        target[i, : len(ids) - 1], labels[i, : len(ids) - 1] = ids[:-1], ids[1:]
    return (source, target), labels, (labels != PAD).astype(np.float32)


def read_corpus(folder: Path) -> tuple[Vocabulary, TokenizedSplit]:
    """Returns the vocabulary of a prepared corpus, and its training split."""
    [file] = folder.glob("vocab-*.model")
    vocabulary = Vocabulary(file)
    return vocabulary, tokenize_split(load_corpus(folder), "train", vocabulary)


def count_ids(batch: Batch) -> tuple[int, int, int, int]:
    """Source tokens, source positions, target tokens, target positions."""
    inputs, labels, weight = batch
    source = inputs["source"] if isinstance(inputs, dict) else inputs[0]
    return int((source != PAD).sum()), source.size, int(weight.sum()), labels.size


def _keras_losses(model: keras.Model) -> None:
    model.compile(
        model.optimizer,
        keras.losses.SparseCategoricalCrossentropy(from_logits=True, ignore_class=PAD),
        weighted_metrics=[
            keras.metrics.SparseCategoricalCrossentropy(from_logits=True, name="nll"),
            keras.metrics.SparseCategoricalAccuracy(name="token_accuracy"),
        ],
    )


def make_side(
    settings: Settings, vocabulary: Vocabulary, batches: list, old: bool = False
):
    """Returns a function that trains on all batches once, compiled already."""
    keras.utils.set_random_seed(0)
    with scope(make_strategy(settings)):
        model = make_model(settings, vocabulary)
        if old:
            _keras_losses(model)

    def generate():
        yield from batches

    any_length = tf.TensorSpec([None, None], tf.int32)
    inputs = tf.nest.map_structure(lambda _: any_length, batches[0][0])
    weight = tf.TensorSpec([None, None], tf.float32)
    data = tf.data.Dataset.from_generator(
        generate, output_signature=(inputs, any_length, weight)
    )
    known = tf.data.experimental.assert_cardinality(len(batches))
    data = data.apply(known).cache()

    def train() -> None:
        model.fit(data, verbose=0, shuffle=False)

    fast = (lambda hlo: hlo) if old else program.fast_on_cpu
    with mock.patch.object(program, "fast_on_cpu", fast):
        train()
    return train


def main() -> None:
    parser = make_parser(__doc__, quick="few steps of a small model")
    parser.add_argument("--data", type=Path, required=True, help="a prepared corpus")
    parser.add_argument("--partitions", type=int, nargs="*", default=[1, 2, 8])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=8, help="of a side and round")
    options = parser.parse_args()
    start = time.perf_counter()
    sizes: dict[str, Any] = {}
    if options.quick:
        sizes = {"model_dim": 16, "hidden_dim": 32, "heads": 2, "batch_tokens": 512}
        options.steps = 2
    settings = Settings(**sizes)
    vocabulary, tokens = read_corpus(options.data)
    row_lengths = choose_row_lengths(tokens, settings.temperature)
    packed = PackedBatches(tokens, row_lengths, settings.batch_tokens)
    sides = {
        "after": [packed.batch(0, i) for i in range(options.steps)],
        "before": padded_batches(tokens, settings, options.steps),
    }
    result: dict[str, Any] = {"row_lengths": list(row_lengths)}
    useful = {}
    for name, batches in sides.items():
        counts = np.sum([count_ids(batch) for batch in batches], axis=0)
        useful[name] = int(counts[0] + counts[2])
        suffix = "" if name == "after" else "_before"
        result[f"fill_source{suffix}"] = round(counts[0] / counts[1], 3)
        result[f"fill_target{suffix}"] = round(counts[2] / counts[3], 3)
    for partitions in options.partitions:
        say(f"{partitions} partitions")
        some = Settings(partitions=partitions, **sizes)
        calls = {
            name: make_side(some, vocabulary, batches, name == "before")
            for name, batches in sides.items()
        }
        times = timing.alternate(calls, options.rounds, warm_up=0)
        rate = {name: useful[name] / timing.median(times, name) for name in sides}
        seconds = timing.ratio(times, "before", "after")
        result[f"{partitions} partitions"] = {
            "over_before": round(seconds * useful["after"] / useful["before"], 2),
            "tokens_per_second": round(rate["after"]),
            "tokens_per_second_before": round(rate["before"]),
        }
    first = f"{options.partitions[0]} partitions"
    result = {"over_before": result[first]["over_before"], **result}
    show(result | circumstances(start, options.quick), options.json)


if __name__ == "__main__":
    main()
