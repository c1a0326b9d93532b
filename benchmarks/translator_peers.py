"""The translator's training beside other libraries', in useful tokens a second.

    python -m benchmarks.translator_peers --data data/S [--json] [--quick]

All train the same sizes on the same sentences, in float32, on all cores, with Adam. A
token is an id of a source or of a target; padding is none. Ours packs sentences into
rows, as `gshard-translate` does. The others get batches as their users make them: of
sentences of like lengths, padded, as many as make about the same number of positions.
`keras` is jit-compiled, so it has four lengths and no others.

Each side lives in a process of its own with one project in it, and they take turns. A
ratio is ours over theirs: above 1 we are ahead. What is not installed is listed with
the command that installs it.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np

from benchmarks.harness import served
from benchmarks.harness.command_line import circumstances, make_parser, say, show
from benchmarks.harness.installed import missing

#: Lengths of the padded rows that jit-compiled Keras gets.
LENGTHS = (16, 32, 48, 64)
PAD, UNK, BOS, EOS = range(4)

Pairs = list[tuple[np.ndarray, np.ndarray]]
#: Trains on all batches once.
Train = Callable[[], None]


def by_length(pairs: Pairs, positions: int) -> list[Pairs]:
    """Sorts by length and cuts into batches of at most so many padded positions."""
    batches: list[Pairs] = [[]]
    for pair in sorted(pairs, key=lambda pair: max(map(len, pair))):
        if (len(batches[-1]) + 1) * max(map(len, pair)) > positions:
            batches.append([])
        batches[-1].append(pair)
    order = np.random.default_rng(0).permutation(len(batches))
    return [batches[i] for i in order if batches[i]]


def of_lengths(pairs: Pairs, positions: int) -> list[tuple[int, Pairs]]:
    """(length, batch) with as many rows in each batch of a length; the rest is left."""
    batches = []
    shortest = 0
    for length in LENGTHS:
        inside = [p for p in pairs if shortest < max(map(len, p)) <= length]
        shortest, rows = length, positions // length
        whole = len(inside) // rows
        batches += [(length, inside[rows * i : rows * i + rows]) for i in range(whole)]
    order = np.random.default_rng(0).permutation(len(batches))
    return [batches[i] for i in order]


def padded(rows: list[np.ndarray], length: int | None = None) -> np.ndarray:
    out = np.full([len(rows), length or max(map(len, rows))], PAD)
    for i, row in enumerate(rows):
        out[i, : len(row)] = row
    return out


def count(batches: list[Pairs]) -> int:
    """The useful tokens: all of the source, all of the target but its bos."""
    return sum(len(s) + len(t) - 1 for batch in batches for s, t in batch)


# ------------------------------------------------------------------------- the sides


def ours(pairs: Pairs, options: dict[str, Any]) -> tuple[Train, int]:
    from benchmarks.translator_throughput import count_ids, make_side, read_corpus
    from gshard_examples.translation.packed_batches import (
        PackedBatches,
        choose_row_lengths,
    )
    from gshard_examples.translation.settings import Settings

    settings = Settings(partitions=options["partitions"], **options["sizes"])
    vocabulary, tokens = read_corpus(Path(options["data"]))
    lengths = choose_row_lengths(tokens, settings.temperature)
    packed = PackedBatches(tokens, lengths, settings.batch_tokens)
    batches = [packed.batch(0, i) for i in range(options["steps"])]
    source, _, target, _ = np.sum([count_ids(batch) for batch in batches], axis=0)
    return make_side(settings, vocabulary, batches), int(source + target)


def torch_side(
    make: Callable[[dict[str, Any]], Any],
) -> Callable[[Pairs, dict[str, Any]], tuple[Train, int]]:
    """A model of transformers, trained op by op as its Trainer does."""

    def side(pairs: Pairs, options: dict[str, Any]) -> tuple[Train, int]:
        import torch

        torch.set_num_threads(os.cpu_count() or 1)
        torch.manual_seed(0)
        model = make(options["sizes"] | {"vocabulary": options["vocabulary"]})
        model.train()
        optimizer = torch.optim.Adam(model.parameters(), 2e-3, betas=(0.9, 0.98))
        batches = by_length(pairs, options["positions"])
        made = []
        for batch in batches:
            source = torch.tensor(padded([s for s, _ in batch]))
            target = torch.tensor(padded([t[:-1] for _, t in batch]))
            labels = torch.tensor(padded([t[1:] for _, t in batch]))
            made.append(
                {
                    "input_ids": source,
                    "attention_mask": (source != PAD).long(),
                    "decoder_input_ids": target,
                    "labels": labels.masked_fill(labels == PAD, -100),
                }
            )

        def train() -> None:
            for batch in made:
                optimizer.zero_grad()
                model(**batch).loss.backward()
                optimizer.step()

        return train, count(batches)

    return side


def _bart(sizes: dict[str, Any]) -> Any:
    import transformers

    return transformers.BartForConditionalGeneration(
        transformers.BartConfig(
            activation_function="relu",
            **_both_sides(sizes),
        )
    )


def _nllb_moe(sizes: dict[str, Any]) -> Any:
    import transformers

    # As many places as ours, for the largest batch: it takes a number, not a factor.
    capacity = 2 * sizes["batch_tokens"] // sizes["experts"]
    config = transformers.NllbMoeConfig(
        encoder_sparse_step=2,
        decoder_sparse_step=2,
        num_experts=sizes["experts"],
        second_expert_policy="sampling",
        expert_capacity=capacity,
        output_router_logits=True,
        **_both_sides(sizes),
    )
    return transformers.NllbMoeForConditionalGeneration(config)


def _both_sides(sizes: dict[str, Any]) -> dict[str, Any]:
    named = {"vocab_size": sizes["vocabulary"], "d_model": sizes["model_dim"]}
    for side in ("encoder", "decoder"):
        named[f"{side}_layers"] = sizes[f"{side}_layers"]
        named[f"{side}_attention_heads"] = sizes["heads"]
        named[f"{side}_ffn_dim"] = sizes["hidden_dim"]
        named[f"{side}_layerdrop"] = 0.0
    return named | {
        "dropout": 0.1,
        "attention_dropout": 0.1,
        "activation_dropout": 0.1,
        "max_position_embeddings": 256,
        "pad_token_id": PAD,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "decoder_start_token_id": BOS,
        "forced_eos_token_id": None,
    }


def keras_side(pairs: Pairs, options: dict[str, Any]) -> tuple[Train, int]:
    """keras-hub's layers, jit-compiled, with Keras's own loss and metric."""
    import keras
    import keras_hub
    import tensorflow as tf

    sizes = options["sizes"]
    keras.utils.set_random_seed(0)
    source, target = (
        keras.Input([None], dtype="int32", name=name) for name in ("source", "target")
    )
    table = keras_hub.layers.ReversibleEmbedding(
        options["vocabulary"], sizes["model_dim"], tie_weights=True, mask_zero=True
    )
    place = keras_hub.layers.SinePositionEncoding()
    layer = {
        "intermediate_dim": sizes["hidden_dim"],
        "num_heads": sizes["heads"],
        "dropout": 0.1,
        "normalize_first": True,
    }
    x = table(source)
    x = x + place(x)
    for _ in range(sizes["encoder_layers"]):
        x = keras_hub.layers.TransformerEncoder(**layer)(x)
    y = table(target)
    y = y + place(y)
    for _ in range(sizes["decoder_layers"]):
        y = keras_hub.layers.TransformerDecoder(**layer)(y, x)
    model = keras.Model([source, target], table(y, reverse=True))
    model.compile(
        keras.optimizers.Adam(2e-3, beta_2=0.98),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True, ignore_class=PAD),
        weighted_metrics=["sparse_categorical_accuracy"],
        jit_compile=True,
    )
    batches = of_lengths(pairs, options["positions"])
    made = []
    for length, batch in batches:
        labels = padded([t[1:] for _, t in batch], length)
        ids = [padded([s for s, _ in batch], length)]
        ids.append(padded([t[:-1] for _, t in batch], length))
        made.append((tuple(ids), labels, (labels != PAD).astype(np.float32)))
    signature = tf.nest.map_structure(
        lambda array: tf.TensorSpec([None, None], array.dtype), made[0]
    )
    data = tf.data.Dataset.from_generator(
        lambda: iter(made), output_signature=signature
    )
    known = tf.data.experimental.assert_cardinality(len(made))
    data = data.apply(known).cache()
    trained = count([batch for _, batch in batches])
    return lambda: model.fit(data, verbose=0, shuffle=False), trained


#: What is needed to run each side.
PACKAGES = {
    "transformers, dense": ("torch", "transformers"),
    "transformers, NLLB-MoE": ("torch", "transformers"),
    "keras-hub, dense": ("keras-hub",),
}
SIDES = {
    "ours": ours,
    "transformers, dense": torch_side(_bart),
    "transformers, NLLB-MoE": torch_side(_nllb_moe),
    "keras-hub, dense": keras_side,
}


# ---------------------------------------------------------------------------- running


def answer(name: str, options: dict[str, Any]) -> None:
    """Answers "train" with the seconds of one pass."""
    with np.load(options["pairs"]) as file:
        pairs = [
            (
                file["source"][slice(*file["source_starts"][i : i + 2])],
                file["target"][slice(*file["target_starts"][i : i + 2])],
            )
            for i in range(len(file["source_starts"]) - 1)
        ]
    train, useful = SIDES[name](pairs, options)
    train()

    def timed() -> float:
        start = time.perf_counter()
        train()
        return time.perf_counter() - start

    served.serve(useful, {"train": timed})


def write_pairs(path: Path, folder: Path, sizes: dict[str, Any], steps: int) -> int:
    """Writes the sentences of our first batches; returns the vocabulary's size."""
    from benchmarks.translator_throughput import read_corpus
    from gshard_examples.translation.packed_batches import (
        PackedBatches,
        choose_row_lengths,
    )

    vocabulary, tokens = read_corpus(folder)
    packed = PackedBatches(tokens, choose_row_lengths(tokens), sizes["batch_tokens"])
    rows = packed.plan(0).select(np.arange(packed.batch_size * steps))
    arrays = {}
    for name in ("source", "target"):
        ids, starts = getattr(tokens, name), getattr(tokens, f"{name}_starts")
        found = [ids[slice(*starts[i : i + 2])] for i in rows.examples]
        arrays[name] = np.concatenate(found)
        arrays[f"{name}_starts"] = np.cumsum([0, *map(len, found)])
    np.savez(path, **arrays)
    return vocabulary.size


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    sizes: dict[str, Any] = {
        "encoder_layers": 2,
        "decoder_layers": 2,
        "model_dim": 16 if options.quick else 128,
        "hidden_dim": 32 if options.quick else 512,
        "heads": 2 if options.quick else 4,
        "experts": 8,
        "batch_tokens": 512 if options.quick else 2048,
    }
    steps = 2 if options.quick else options.steps
    given = {
        "data": str(options.data),
        "pairs": str(folder / "pairs.npz"),
        "sizes": sizes,
        "positions": sizes["batch_tokens"],
        "steps": steps,
        "vocabulary": write_pairs(folder / "pairs.npz", options.data, sizes, steps),
    }
    wanted = {f"ours, {n} partitions": ("ours", n) for n in options.partitions}
    absent: dict[str, str] = {}
    for name in options.peers:
        packages = missing(PACKAGES[name])
        if packages:
            absent[name] = "pip install " + " ".join(packages)
        else:
            wanted[name] = (name, 0)
    sides, failed = {}, {}
    for name, (kind, partitions) in wanted.items():
        say(f"{name}: starts")
        arguments = ["--serve", kind, json.dumps(given | {"partitions": partitions})]
        try:
            sides[name] = served.Side(name, "benchmarks.translator_peers", arguments)
        except served.SideError as error:
            failed[name] = str(error)
            say(f"{name} failed: {error}")
    rates: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(2 if options.quick else options.rounds):
        for name in reversed(sides) if turn % 2 else sides:
            rates[name].append(sides[name].hello / sides[name].ask("train"))
    for side in sides.values():
        side.close()
    result: dict[str, Any] = {
        "tokens_per_second": {n: round(statistics.median(r)) for n, r in rates.items()}
    }
    for name in wanted:
        if name.startswith("ours") and name in rates:
            result[f"peers, {name.removeprefix('ours, ')}"] = {
                peer: round(
                    statistics.median(
                        a / b for a, b in zip(rates[name], rates[peer], strict=True)
                    ),
                    2,
                )
                for peer in rates
                if not peer.startswith("ours")
            }
    return result | {"not_installed": absent, "failed": failed}


def main() -> None:
    parser = make_parser(__doc__, quick="few steps of small models")
    parser.add_argument("--data", type=Path, help="a prepared corpus")
    parser.add_argument("--partitions", type=int, nargs="*", default=[1, 8])
    parser.add_argument(
        "--peers", nargs="*", choices=list(PACKAGES), default=list(PACKAGES)
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=8, help="our batches of a round")
    parser.add_argument("--serve", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        answer(options.serve[0], json.loads(options.serve[1]))
        return
    if options.data is None:
        parser.error("--data must name a prepared corpus")
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        result = measure(options, Path(folder))
    show(result | circumstances(start, options.quick), options.json)


if __name__ == "__main__":
    main()
