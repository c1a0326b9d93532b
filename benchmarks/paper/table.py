"""The paper's models on its own machine, compiled and never run.

    python -m benchmarks.paper.table [--json] [--quick] [--models NAME,...]

Each row is a *train step* of `keras_layers.Transformer` with the paper's dimensions
(M 1024, H 8192, 16 heads of 128, vocabularies of 64,000 and 32,000, dropout 0.1,
Adafactor) for the TPU v3 slice that the paper trained it on, planned by
`gshard_tf.plan`: one expert and one row of 1,024 source and 1,024 target tokens per
core. Needs libtpu (`pip install 'gshard-tf[aot]'`), no TPU.

Models: 128E12L, 512E12L, 2048E12L, 128E36L, 512E36L, 2048E36L, 2048E60L and T96L
(dense), and 16E12L, which is not the paper's; with `:bf16` behind, activations are in
bfloat16; with `:fsdp` behind that, dense weights and their slots are spread over all
cores (`AxisRules.fsdp`). Without `--models`: the paper's 12-layer ones. `--quick`: one
dense and one MoE block in encoder and decoder each. Models of 12 layers compute
attention weights again for the gradient (`remat="attention"` of `Transformer`), deeper
ones everything, in loops over stacked blocks (`stacked=True, remat=True`).

One JSON object per row. `hbm_gb` is what the compiled program needs per core,
`paper_hbm_gb` what the paper measured (Figure 7, read off the picture).
`flops_over_analytic` compares the FLOPs of the compiled products with those of the
formulas in this file, which count a recomputed block four times, not three, and
recomputed attention weights not at all.
`step_s_roofline` is an estimate that no real step can be faster than; `paper_step_s`
was measured (Table 3), at 8,192 tokens per core for 128 experts.
"""

import argparse
import json
import os
import re
import subprocess
import sys
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import keras
import tensorflow as tf

import gshard_tf
from benchmarks.harness.command_line import make_parser
from gshard_tf.optimizers import Adafactor
from keras_layers import Transformer

M, H, N, D = 1024, 8192, 16, 128
SOURCE_VOCABULARY, TARGET_VOCABULARY = 64_000, 32_000
LENGTH = 1024  # of source and target each
TOPOLOGIES = {16: "v3:2x4", 128: "v3:8x8", 512: "v3:16x16", 2048: "v3:32x32"}

# Experts, layers -> GB per core (Figure 7), steps per second (Table 3).
PAPER = {
    (16, 12): (None, None),
    (128, 12): (4.18, 2.16),
    (512, 12): (4.24, 3.28),
    (2048, 12): (4.86, 2.15),
    (128, 36): (None, 0.67),
    (512, 36): (None, 1.05),
    (2048, 36): (11.97, 0.72),
    (2048, 60): (13.85, None),
    (0, 96): (None, None),
}
DEFAULT = ["128E12L", "512E12L", "2048E12L"]


def parse(name: str) -> tuple[int, int, bool, bool]:
    """Experts, layers, whether in bfloat16, and whether dense weights are spread."""
    parts = re.fullmatch(r"(?:(\d+)E(\d+)L|T(\d+)L)(:bf16)?(:fsdp)?", name)
    if parts is None or ((int(parts[1] or 0), int(parts[2] or parts[3])) not in PAPER):
        names = ", ".join(f"{e}E{n}L" if e else f"T{n}L" for e, n in PAPER)
        raise SystemExit(
            f"Models are {names}, or one with :bf16, :fsdp. Received: {name!r}"
        )
    return (
        int(parts[1] or 0),
        int(parts[2] or parts[3]),
        bool(parts[4]),
        bool(parts[5]),
    )


def analytic_flops(experts: int, blocks: int, remat: bool) -> float:
    """FLOPs of the products of a train step per core, from the paper's formulas.

    `blocks` each in encoder and decoder, every other one with experts.
    """
    tokens = LENGTH  # one row of source and one of target
    attention = 4 * 2 * tokens * M * N * D + 2 * 2 * tokens * LENGTH * N * D
    dense = 2 * 2 * tokens * M * H
    # Each token has two slots: C = 2 S / E.
    mixture = 2 * dense + 2 * tokens * M * experts
    moe_blocks = blocks // 2 if experts else 0
    feeding = (blocks - moe_blocks) * dense + moe_blocks * mixture
    forward = blocks * attention + feeding  # encoder
    forward += 2 * blocks * attention + feeding  # decoder: two attentions
    output = 2 * tokens * M * TARGET_VOCABULARY
    return (4 if remat else 3) * forward + 3 * output


def rules(spread: bool) -> gshard_tf.AxisRules:
    """The paper's layout; `spread`: dense weights over all cores, too."""
    paper = dict.fromkeys(("batch", "group", "expert"), "expert")
    return gshard_tf.AxisRules(paper, fsdp="expert" if spread else None)


def transformer(experts: int, blocks: int, deep: bool, low: bool) -> keras.Model:
    """The paper's model, compiled.

    Args:
        experts: Per MoE layer; 0: none.
        blocks: Of the encoder and of the decoder each.
        deep: Whether blocks are stacked, and computed again for the gradient.
        low: Whether activations are in bfloat16.
    """
    model = Transformer(
        SOURCE_VOCABULARY,
        TARGET_VOCABULARY,
        blocks,
        blocks,
        model_dim=M,
        hidden_dim=H,
        num_heads=N,
        key_dim=D,
        num_experts=experts or None,
        dropout=0.1,
        seed=0,
        stacked=deep,
        remat=deep or "attention",
        dtype="mixed_bfloat16" if low else "float32",
        name="transformer",
    )
    model.compile(
        Adafactor(0.01, relative_step=False),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    return model


def run(name: str, quick: bool) -> dict[str, Any]:
    """One row; in a process of its own, whose memory it reports."""
    experts, layers, low, spread = parse(name)
    blocks = 2 if quick else layers // 2
    deep = layers > 12 and not quick
    cores = experts or 2048

    def build() -> keras.Model:
        return transformer(experts, blocks, deep, low)

    ids = tf.TensorSpec([cores, LENGTH], tf.int32)
    plan = gshard_tf.plan(
        build, TOPOLOGIES[cores], {"expert": cores}, rules(spread), ((ids, ids), ids)
    )
    moe_layers = 2 * (blocks // 2) if experts else 0
    analytic = analytic_flops(experts, blocks, deep)
    paper_hbm, paper_rate = PAPER[experts, layers]
    row: dict[str, Any] = {
        "model": name,
        "topology": plan.topology,
        "layers": 2 * blocks,
        "tokens_per_core": 2 * LENGTH,
        "recomputed": "blocks" if deep else "attention",
        "weights": plan.parameters,
        "fits": plan.fits,
        "hbm_gb": plan.bytes_needed / 1e9,
        "paper_hbm_gb": None if quick else paper_hbm,
        "state_gb": plan.state_bytes(per_core=True) / 1e9,
        "temporaries_gb": plan.memory.temporaries / 1e9 if plan.fits else None,
        "code_gb": plan.memory.code / 1e9 if plan.fits else None,
        "tflops": plan.flops and plan.flops / 1e12,
        "flops_over_analytic": plan.flops and plan.flops / analytic,
        "flops_over_written": plan.flops_ratio,
        "expert_all_gathers": sum(
            c.count
            for c in plan.communication
            if c.kind == "all-gather" and "experts" in c.layer
        ),
        "all_gathers": plan.count("all-gather"),
        "all_to_all_per_moe_layer": (
            plan.count("all-to-all") / moe_layers if moe_layers else None
        ),
        "collective_gb": sum(c.bytes for c in plan.communication) / 1e9,
        "trace_s": plan.trace_seconds,
        "compile_s": plan.compile_seconds,
        "host_gb": plan.host_bytes / 1e9,
        "step_s_roofline": None,
        "paper_step_s": None if quick or not paper_rate else 1 / paper_rate,
    }
    if plan.time is not None:
        peak = plan.chip["flops"] / plan.chip["devices"]
        exchange = sum(c.seconds for c in plan.communication if c.kind == "all-to-all")
        routers = sum(f for n, f in plan.flops_by_layer.items() if "router" in n)
        whole = plan.time.compute + exchange
        row |= {
            "step_s_roofline": plan.time.roofline,
            "compute_s": plan.time.compute,
            "hbm_s": plan.time.hbm,
            "interconnect_s": plan.time.interconnect,
            # Of products and exchanges alone, as in the paper's Figure 8.
            "routing_share": (routers / peak + exchange) / whole,
        }
    return row


def main() -> None:
    parser = make_parser(__doc__, quick="two blocks of each kind")
    parser.add_argument("--models", default=",".join(DEFAULT), help="comma-separated")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.row:
        print(json.dumps(run(options.row, options.quick)))
        return
    names = options.models.split(",")
    for name in names:
        parse(name)
    for name in names:
        command = [sys.executable, "-m", "benchmarks.paper.table", "--row", name]
        if options.quick:
            command.append("--quick")
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        if done.returncode:
            raise SystemExit(f"{name} failed with status {done.returncode}")
        line = done.stdout.strip().splitlines()[-1]
        if options.json:
            print(line, flush=True)
            continue
        for key, value in json.loads(line).items():
            print(
                f"{key:26s} {value if not isinstance(value, float) else f'{value:.4g}'}"
            )
        print(flush=True)


if __name__ == "__main__":
    main()
