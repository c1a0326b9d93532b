"""Speed of decoding: cached or not, compiled or not, compared with other libraries.

    python -m benchmarks.decoding.speed [--json] [--quick] [--seconds S] [--only SIDE]
        [--batches N N N]

An encoder-decoder with random weights generates 64 tokens for sources of 32, at
batches of 1, 8 and 64; no sequence ends early, so every side makes as many tokens.
Compared with Hugging Face transformers' `generate` of models of the same sizes,
NLLB-MoE (every other layer experts, top-2) and M2M100 (dense; the same code without
experts), and with tf-models-official's `sequence_beam_search` over our model, compiled.
Each side lives in a process of its own, one after the other, on all cores. Float32.

* first: seconds from the first call to its answer (tracing and compiling included);
* p50, p99: seconds of a call, of the calls that fit into `--seconds` (3 at least,
  but no further one after 20 seconds);
* tokens per second at the p50, of the sequences that are returned.

Uncached is the whole prefix through the decoder again for each token, the encoder's
output kept: compiled, in four loops over prefixes of a quarter, a half, ... of the
length; and op by op, with the prefix growing by one. About ten minutes on two cores;
`--quick` runs tiny sizes, whose figures say nothing but that the script runs.
"""

import argparse
import dataclasses
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np

from benchmarks.harness.command_line import circumstances, make_parser, say

INSTALL = "pip install 'gshard-tf[benchmarks]'"


@dataclasses.dataclass(frozen=True)
class Size:
    """Sizes of the model and of its batches; letters as in the paper."""

    layers: int = 2  # of encoder and of decoder
    model_dim: int = 256
    hidden_dim: int = 1024
    heads: int = 8
    experts: int = 8
    vocabulary: int = 8192
    source: int = 32
    target: int = 64
    batches: tuple[int, ...] = (1, 8, 64)
    beam: int = 4


TINY = Size(
    layers=2,
    model_dim=16,
    hidden_dim=32,
    heads=2,
    experts=4,
    vocabulary=64,
    source=6,
    target=5,
    batches=(1, 2),
)

Call = Callable[[], Any]

#: Seconds of calls after which a slow way has been called often enough.
LONG = 20.0


def sources(size: Size, batch: int) -> np.ndarray:
    """Ids without padding or ends."""
    rng = np.random.default_rng(batch)
    return rng.integers(4, size.vocabulary, (batch, size.source))


# ------------------------------------------------------------------------------ ours


def ours(size: Size, experts: int) -> Iterator[tuple[str, int, Call]]:
    """(way, batch, what makes its tokens) of our Transformer."""
    import tensorflow as tf

    from keras_layers import beam_search, greedy_decode

    model = our_model(size, experts)
    end, length = 1, size.target
    _never_generate(model, end)

    def greedy(ids):
        return greedy_decode(model, ids, length, 2, end)[0]

    def search(flat):
        return lambda ids: beam_search(
            model, ids, length, 2, end, size.beam, flat=flat
        ).ids[:, 0]

    grow = tf.function(
        lambda *inputs: tf.argmax(
            _last_logits(model, *inputs), axis=-1, output_type=tf.int32
        ),
        reduce_retracing=True,
    )
    encode = tf.function(lambda ids: model.encode(ids, decoding=True))

    def uncached_op_by_op(ids):
        memory, mask = encode(ids)
        prefix = np.full([len(ids), length + 1], 2, np.int32)
        for i in range(length):
            prefix[:, i + 1] = grow(
                memory, mask, tf.constant(prefix[:, : i + 1]), tf.constant(i)
            )
        return tf.constant(prefix[:, 1:])

    def uncached(ids):
        memory, mask = model.encode(ids, decoding=True)
        prefix = tf.fill([ids.shape[0], length + 1], 2)
        place = tf.range(length + 1)
        quarters = sorted({-(-length * i // 4) for i in range(5)})
        for begin, end in itertools.pairwise(quarters):

            def longer(i, prefix, end=end):
                logits = _last_logits(model, memory, mask, prefix[:, :end], i)
                chosen = tf.argmax(logits, axis=-1, output_type=tf.int32)
                return i + 1, tf.where(place == i + 1, chosen[:, None], prefix)

            _, prefix = tf.while_loop(
                lambda i, prefix, end=end: i < end,
                longer,
                (tf.constant(begin), prefix),
            )
        return prefix[:, 1:]

    ways = {
        "greedy, compiled": tf.function(greedy, jit_compile=True),
        "beam, compiled": tf.function(search(False), jit_compile=True),
        "flat beam, compiled": tf.function(search(True), jit_compile=True),
    }
    if experts:
        ways |= {
            "greedy, op by op": tf.function(greedy),
            "uncached, compiled": tf.function(uncached, jit_compile=True),
            "uncached, op by op": uncached_op_by_op,
        }
    for batch in size.batches:
        ids = tf.constant(sources(size, batch), tf.int32)
        for way, function in ways.items():
            if way == "uncached, op by op" and batch > 8:
                continue  # a minute a call
            yield way, batch, lambda function=function, ids=ids: function(ids).numpy()


def our_model(size: Size, experts: int) -> Any:
    """The Transformer with random weights."""
    import keras

    from keras_layers import Transformer

    keras.utils.set_random_seed(0)
    model = Transformer(
        size.vocabulary,
        size.vocabulary,
        size.layers,
        size.layers,
        model_dim=size.model_dim,
        hidden_dim=size.hidden_dim,
        num_heads=size.heads,
        num_experts=experts or None,
        dropout=0.0,
        share_embeddings=True,
    )
    model.build([(None, None), (None, None)])
    return model


def _never_generate(model: Any, token: int) -> None:
    """Gives an id the least of all logits, whatever is decoded."""
    import tensorflow as tf

    # The row sees only the mean of what it is multiplied with: 0.001 then, else 0.
    beta, table = model.decoder_norm.beta, model.target_embedding.table
    beta.assign(tf.fill(beta.shape, 1e-3))
    row = tf.fill([1, table.shape[1]], -1e5)
    table.assign(tf.tensor_scatter_nd_update(table, [[token]], row))


def _last_logits(model: Any, memory: Any, mask: Any, prefix: Any, last: Any) -> Any:
    """Logits of position `last`, by the model's own blocks over all of `prefix`."""
    import tensorflow as tf

    from keras_layers.embedding import sinusoids

    x = model.target_embedding(prefix)
    x = x + sinusoids(tf.range(tf.shape(prefix)[1]), model.model_dim)[None]
    for block in model.decoder_blocks:
        x = block(x, memory, memory_mask=mask, token_ids=prefix, decoding=True)
    x = tf.gather(x, [last], axis=1)  # [B, 1, M]
    return model.target_embedding.project(model.decoder_norm(x))[:, 0]


# ------------------------------------------------------------------------- tf-models


def tf_models_search(size: Size) -> Iterator[tuple[str, int, Call]]:
    """tf-models-official's beam search over our model's caches, compiled.

    It stops as ours does with `early_stop=False`; where nothing ends both run to the
    end. Raises RuntimeError unless it finds what ours finds.
    """
    import tensorflow as tf
    from official.nlp.modeling.ops import sequence_beam_search

    from keras_layers import beam_search

    model = our_model(size, size.experts)
    end, length = 1, size.target
    # Ends are rare but possible, so that there is something to compare.
    table = model.target_embedding.table
    table.assign(tf.tensor_scatter_nd_update(table, [[end]], [table[end] * 2.0]))

    def theirs(ids):
        state = model.start_decoding(ids, length)
        # It takes nothing but floats, and repeats all of it for each hypothesis.
        state["memory_mask"] = tf.cast(state["memory_mask"], tf.float32)
        weights = state.pop("weights")

        def logits_of(tokens, index, cache):
            seen = cache["memory_mask"]
            cache = {**cache, "memory_mask": seen > 0, "weights": weights}
            logits, cache = model.decode_step(tokens[:, -1], cache, index)
            cache.pop("weights")
            logits = tf.where(tf.range(size.vocabulary) == model.pad_id, -1e6, logits)
            return logits, {**cache, "memory_mask": seen}

        beams, scores = sequence_beam_search(
            logits_of,
            tf.fill([ids.shape[0]], 2),
            state,
            size.vocabulary,
            size.beam,
            0.8,
            length,
            end,
            padded_decode=True,
        )
        return beams[:, 0, 1:], scores[:, 0]

    def mine(ids):
        hypotheses = beam_search(
            model, ids, length, 2, end, size.beam, 0.8, early_stop=False
        )
        best = hypotheses.ids[:, 0]
        # Theirs has no length penalty where no hypothesis of a row has ended.
        ended = tf.reduce_any(best == end, axis=-1)
        return best, tf.where(
            ended, hypotheses.scores[:, 0], hypotheses.log_probs[:, 0]
        )

    both = {
        name: tf.function(search, jit_compile=True)
        for name, search in (("theirs, compiled", theirs), ("ours, compiled", mine))
    }
    for batch in size.batches:
        ids = tf.constant(sources(size, batch), tf.int32)
        for way, search in both.items():
            yield way, batch, lambda search=search, ids=ids: search(ids)[0].numpy()
        (found, scores), (wanted, ranked) = (search(ids) for search in both.values())
        # Up to the end: theirs fills the rest with the first id, ours with padding.
        found, wanted = found.numpy(), wanted.numpy()
        same = np.mean(np.all((found == wanted) | (wanted == model.pad_id), axis=1))
        # Theirs makes probabilities of what is left without padding, ours leaves
        # padding's share out; over all tokens that is up to a few ten-thousandths.
        apart = np.max(np.abs(scores.numpy() / ranked.numpy() - 1))
        ended = np.mean(np.any(found == end, axis=1))
        say(f"same best: {same:.3f}, scores apart: {apart:.1e}, ended: {ended:.3f}")
        if apart > 1e-3:
            raise RuntimeError(f"The two searches find other scores: {apart} of them")


# ------------------------------------------------------------------- transformers


def transformers_model(size: Size, experts: int) -> Iterator[tuple[str, int, Call]]:
    """The same of Hugging Face transformers."""
    import torch
    from transformers import (
        M2M100Config,
        M2M100ForConditionalGeneration,
        NllbMoeConfig,
        NllbMoeForConditionalGeneration,
    )

    torch.manual_seed(0)
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    arguments = {
        "vocab_size": size.vocabulary,
        "d_model": size.model_dim,
        "encoder_layers": size.layers,
        "decoder_layers": size.layers,
        "encoder_ffn_dim": size.hidden_dim,
        "decoder_ffn_dim": size.hidden_dim,
        "encoder_attention_heads": size.heads,
        "decoder_attention_heads": size.heads,
        "max_position_embeddings": 2 * (size.source + size.target),
        "dropout": 0.0,
        "pad_token_id": 0,
        "bos_token_id": 2,
        "eos_token_id": 1,
        "decoder_start_token_id": 2,
    }
    if experts:
        config = NllbMoeConfig(
            **arguments,
            num_experts=experts,
            encoder_sparse_step=2,
            decoder_sparse_step=2,
        )
        model = NllbMoeForConditionalGeneration(config)
    else:
        model = M2M100ForConditionalGeneration(M2M100Config(**arguments))
    model.eval()

    def generate(ids, beams):
        with torch.inference_mode():
            generated = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                min_new_tokens=size.target,
                max_new_tokens=size.target,
                num_beams=beams,
                do_sample=False,
            )
        return generated.numpy()

    for batch in size.batches:
        ids = torch.tensor(sources(size, batch))
        for way, beams in (("greedy", 1), ("beam", size.beam)):
            yield way, batch, lambda ids=ids, beams=beams: generate(ids, beams)


SIDES = {
    "ours, experts": lambda size: ours(size, size.experts),
    "ours, dense": lambda size: ours(size, 0),
    "tf-models' search": tf_models_search,
    "transformers, experts": lambda size: transformers_model(size, size.experts),
    "transformers, dense": lambda size: transformers_model(size, 0),
}


# ------------------------------------------------------------------------ measuring


def measure(call: Call, tokens: int, seconds: float) -> dict[str, float]:
    """First answer, latencies and tokens per second of one way to decode."""
    start = time.perf_counter()
    shape = call().shape
    first = time.perf_counter() - start
    times: list[float] = []
    end = time.perf_counter() + seconds
    while sum(times) < LONG and (len(times) < 3 or time.perf_counter() < end):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    p50, p99 = np.percentile(times, [50, 99])
    return {
        "first": first,
        "p50": p50,
        "p99": p99,
        "calls": len(times),
        "tokens_per_second": shape[0] * tokens / p50,
    }


def side(name: str, size: Size, seconds: float) -> list[dict[str, Any]]:
    """All of one side, in this process."""
    rows = []
    for way, batch, call in SIDES[name](size):
        timing = measure(call, size.target, seconds)
        rows.append({"side": name, "way": way, "batch": batch, **timing})
        say(f"{name:22} {way:20} batch {batch:3}  p50 {timing['p50']:.3f} s")
    return rows


def run(
    names: list[str], size: Size, seconds: float, quick: bool
) -> list[dict[str, Any]]:
    """These sides, each in a process of its own."""
    rows = []
    for name in names:
        command = [sys.executable, "-m", "benchmarks.decoding.speed", "--side", name]
        command += ["--seconds", str(seconds), *(["--quick"] if quick else [])]
        command += ["--batches", *map(str, size.batches)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True)  # noqa: S603
        if done.returncode == 3:
            say(f"{name}: what it measures is not installed: {INSTALL}")
            continue
        if done.returncode:
            # What the other sides took minutes for is not lost.
            say(f"{name} FAILED with status {done.returncode}: it has no rows")
            continue
        rows += json.loads(done.stdout.splitlines()[-1])
    return rows


def ratios(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Seconds of the first over seconds of the second, at the p50."""
    p50 = {(r["side"], r["way"], r["batch"]): r["p50"] for r in rows}
    quotients = {}
    for batch in sorted({r["batch"] for r in rows}):

        def ratio(name, one, other, batch=batch):
            if (*one, batch) in p50 and (*other, batch) in p50:
                quotient = p50[(*one, batch)] / p50[(*other, batch)]
                quotients[f"{name}, batch {batch}"] = quotient

        mine = "ours, experts"
        compiled = (mine, "greedy, compiled")
        for way in ("compiled", "op by op"):
            ratio(f"uncached {way} / cached", (mine, f"uncached, {way}"), compiled)
        ratio("op by op / compiled", (mine, "greedy, op by op"), compiled)
        ratio(
            "beam / flat beam", (mine, "beam, compiled"), (mine, "flat beam, compiled")
        )
        searches = "tf-models' search"
        ratio(
            "tf-models' / our search",
            (searches, "theirs, compiled"),
            (searches, "ours, compiled"),
        )
        for kind in ("experts", "dense"):
            for way in ("greedy", "beam"):
                best = min(
                    (
                        key
                        for key in p50
                        if key[0] == f"ours, {kind}"
                        and key[2] == batch
                        and key[1].removeprefix("flat ").startswith(way)
                    ),
                    key=p50.get,
                    default=("", "", 0),
                )
                theirs = (f"transformers, {kind}", way)
                ratio(f"transformers / ours, {kind}, {way}", theirs, best[:2])
    return quotients


def main() -> None:
    parser = make_parser(__doc__, quick="tiny sizes", seconds=2.0)
    parser.add_argument(
        "--only", choices=SIDES, action="append", help="this side; can be repeated"
    )
    parser.add_argument("--batches", type=int, nargs="+", help="these batches")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    size = TINY if options.quick else Size()
    if options.batches:
        size = dataclasses.replace(size, batches=tuple(options.batches))
    seconds = min(options.seconds, 0.1) if options.quick else options.seconds
    if options.side:
        try:
            rows = side(options.side, size, seconds)
        except ModuleNotFoundError:
            sys.exit(3)
        print(json.dumps(rows))
        return
    start = time.perf_counter()
    rows = run(options.only or list(SIDES), size, seconds, options.quick)
    result = {
        "size": dataclasses.asdict(size),
        "rows": rows,
        "ratios": ratios(rows),
        **circumstances(start, options.quick),
    }
    if options.json:
        print(json.dumps(result, indent=1))
        return
    print(f"{'side':22} {'way':20} batch  first    p50     p99   tokens/s")
    for row in rows:
        print(
            f"{row['side']:22} {row['way']:20} {row['batch']:5} {row['first']:6.2f} "
            f"{row['p50']:7.3f} {row['p99']:7.3f} {row['tokens_per_second']:9.0f}"
        )
    for name, value in result["ratios"].items():
        print(f"{name}: {value:.2f}")


if __name__ == "__main__":
    main()
