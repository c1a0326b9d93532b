"""Memory of a device for one long sequence that is split over a TPU slice.

    python -m benchmarks.long_context [--json] [--quick] [--topologies NAME,...]

A train step of a byte-level model (one block, M 512, 8 heads of 64, H 2048, Adam,
float32) on one sequence of 131,072 tokens, planned by `gshard_tf.plan` with `length`
over all devices and attention as a ring (`context_parallel="ring"`). Needs libtpu
(`pip install 'gshard-tf[aot]'`), no TPU.

One JSON object per slice. `gb` is what a device needs, and `capacity_gb` what it has.
`scores_gb` is the size of one device's scores, `[1, N, L / n, L / n]` for n devices,
which falls as 1 / n squared; all other activations fall as 1 / n.
"""

import os
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import keras
import tensorflow as tf

import gshard_tf
from benchmarks.harness.command_line import make_parser, say, show
from keras_layers import EncoderBlock, TokenEmbedding, VocabularyProjection

TOKENS, M, N, H, VOCABULARY = 131_072, 512, 8, 2048, 256
TOPOLOGIES = "v5e:2x2,v5e:2x4,v5e:4x4"


def build(tokens: int) -> keras.Model:
    """The model, compiled."""
    ids = keras.Input((tokens,), batch_size=1, dtype="int32")
    x = TokenEmbedding(VOCABULARY, M)(ids)
    x = EncoderBlock(N, M // N, H, dropout=0.0, seed=0, context_parallel="ring")(x)
    model = keras.Model(ids, VocabularyProjection(VOCABULARY)(x), name="long")
    model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    return model


def run(topology: str, tokens: int) -> dict[str, Any]:
    """One row."""
    ids = tf.TensorSpec([1, tokens], tf.int32)
    devices = 1
    for size in topology.partition(":")[2].split("x"):
        devices *= int(size)
    plan = gshard_tf.plan(
        lambda: build(tokens),
        topology,
        {"seq": devices},
        gshard_tf.AxisRules({"length": "seq"}),
        (ids, ids),
        progress=say,
    )
    part = tokens // devices
    return {
        "topology": topology,
        "devices": devices,
        "tokens": tokens,
        "fits": plan.fits,
        "gb": plan.bytes_needed / 1e9,
        "capacity_gb": plan.bytes_available and plan.bytes_available / 1e9,
        "state_gb": plan.state_bytes(per_core=True) / 1e9,
        "scores_gb": 4 * N * part**2 / 1e9,
        "permutes": plan.count("collective-permute"),
        "all_gathers": plan.count("all-gather"),
        "step_s": plan.time and plan.time.without_overlap,
    }


def main() -> None:
    parser = make_parser(__doc__, quick="1,024 tokens")
    parser.add_argument("--topologies", default=TOPOLOGIES, help="comma-separated")
    options = parser.parse_args()
    for topology in options.topologies.split(","):
        row = run(topology, 1024 if options.quick else TOKENS)
        show(row, options.json)


if __name__ == "__main__":
    main()
