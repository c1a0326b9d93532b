"""Does a trained translator say the same however it decodes?

    python -m benchmarks.decoding.agreement --run RUN --data DATA [--sentences 1000]
        [--partitions 8] [--json]

Sentences of the test split, translated by the model of a run of the translation
example: greedily and with a beam of 4, with caches and with all of the prefix again for
each token; with a beam of 1; with the flat beam search; and on a mesh. Printed for each
pair of ways: the share of hypotheses that are equal token for token (all 4 of a beam),
and the largest difference of their scores, of all of them and of the equal ones.
"""

import pathlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

import gshard_tf
from benchmarks.harness.command_line import (
    circumstances,
    make_parser,
    say,
    show,
)

BATCH, LONGEST, WIDTHS, BEAM = 128, 32, (16, 48), 4


def batches(ids: np.ndarray) -> Iterator[tuple[np.ndarray, int]]:
    """Sources of two widths and one number of rows; how many of the rows count."""
    for begin in range(0, len(ids), BATCH):
        rows = ids[begin : begin + BATCH]
        length = np.count_nonzero(rows, axis=1).max()
        width = next(width for width in WIDTHS if width >= length)
        padded = np.zeros([BATCH, width], np.int32)
        padded[: len(rows)] = rows[:, :width]
        yield padded, len(rows)


def decode(name: str, way: Callable[[Any], Any], ids: np.ndarray) -> list[np.ndarray]:
    """`[ids [rows, n, T], scores [rows, n]]` of all sources."""
    start = time.perf_counter()
    parts = []
    for padded, rows in batches(ids):
        parts.append([np.asarray(part)[:rows] for part in way(padded)])
    say(f"{name}: {time.perf_counter() - start:.0f} s")
    return [np.concatenate(part) for part in zip(*parts, strict=True)]


def compare(
    name: str, one: list[np.ndarray], other: list[np.ndarray]
) -> dict[str, dict[str, float]]:
    """By the name of the pair: how much of it is equal."""
    equal = np.all(one[0] == other[0], axis=-1)
    apart = np.abs(one[1] - other[1])
    differences = {
        "equal": float(equal.mean()),
        "scores_apart": float(apart.max()),
        "scores_apart_where_equal": float(apart[equal].max()),
    }
    say(f"{name}: {differences}")
    return {name: differences}


def ways_of(model: Any) -> dict[str, Callable[[Any], Any]]:
    """Greedy decoding and beam searches of a model: `[B, L]` -> ids and scores."""
    import tensorflow as tf

    from gshard_examples.translation.vocabulary import BOS, EOS
    from keras_layers import beam_search, greedy_decode, length_limits

    def greedy(ids):
        limits = length_limits(ids, factor=2.0)
        best, log_probs = greedy_decode(model, ids, LONGEST, BOS, EOS, limits)
        return best[:, None], log_probs[:, None]

    def search(beam, flat=False):
        def run(ids):
            limits = length_limits(ids, factor=2.0)
            hypotheses = beam_search(
                *(model, ids, LONGEST, BOS, EOS, beam),
                **{"num_results": beam, "limits": limits, "flat": flat},
            )
            return hypotheses.ids, hypotheses.log_probs

        return run

    ways = {
        "greedy": greedy,
        "beam 1": search(1),
        "beam": search(BEAM),
        "flat beam": search(BEAM, True),
    }
    return {name: tf.function(way) for name, way in ways.items()}


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--run", type=pathlib.Path, required=True)
    parser.add_argument("--data", type=pathlib.Path, required=True)
    parser.add_argument("--sentences", type=int, default=1000)
    parser.add_argument("--partitions", type=int, default=8)
    options = parser.parse_args()
    start = time.perf_counter()
    gshard_tf.request_cpu_devices(options.partitions)

    from benchmarks.decoding.uncached import Uncached
    from gshard_examples.translation.corpus import load_corpus
    from gshard_examples.translation.model import make_model
    from gshard_examples.translation.train import (
        load_model,
        restore_weights,
        sample_pairs,
    )

    settings, vocabulary, model = load_model(options.run)
    pairs = sample_pairs(load_corpus(options.data), "test", options.sentences)
    pairs.sort(key=lambda pair: len(pair.source))
    ids = vocabulary.encode_source(
        [pair.lang for pair in pairs],
        [pair.source for pair in pairs],
        max_length=WIDTHS[-1],
    ).to_tensor(0)
    outputs = {
        name: decode(name, way, ids.numpy()) for name, way in ways_of(model).items()
    }
    uncached = ways_of(Uncached(model))
    pieces = {}
    for name in ("greedy", "beam"):
        other = decode(f"{name}, uncached", uncached[name], ids.numpy())
        pieces |= compare(f"{name}: cached, uncached", outputs[name], other)
    pieces |= compare("beam of 1, greedy", outputs["beam 1"], outputs["greedy"])
    pieces |= compare("flat beam, beam", outputs["flat beam"], outputs["beam"])

    strategy = gshard_tf.SpmdStrategy(
        gshard_tf.create_mesh({"expert": options.partitions})
    )
    with strategy.scope():
        spread = make_model(settings, vocabulary)
    restore_weights(options.run, spread)
    ways = ways_of(spread)
    for name in ("greedy", "beam"):
        other = decode(
            f"{name}, {options.partitions} partitions",
            lambda rows, way=ways[name]: strategy.run(way, (rows,)),
            ids.numpy(),
        )
        pair = f"{name}: one device, {options.partitions} partitions"
        pieces |= compare(pair, outputs[name], other)
    best = {tuple(row) for row in outputs["beam"][0][:, 0].tolist()}
    show(
        {
            "sentences": len(pairs),
            "different_translations": len(best),
            **pieces,
            "circumstances": circumstances(start, quick=False),
        },
        options.json,
    )


if __name__ == "__main__":
    main()
