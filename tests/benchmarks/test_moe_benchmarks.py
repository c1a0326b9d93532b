"""The MoE benchmarks run, in their tiny form, and print what they promise."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import tensorflow as tf
from processes import ROOT

from benchmarks.harness import memory, served, timing
from benchmarks.moe import peers
from benchmarks.moe.peer_blocks import OURS, PEERS, Peer
from benchmarks.moe.scaling import routing_bytes
from benchmarks.moe.steps import (
    Shape,
    layer_step,
    matmul_arguments,
    matmul_step,
    tokens_and_gradients,
)

SHAPE = Shape(experts=4, model_dim=8, hidden_dim=16, groups=2, group_size=16)


def run_script(name, *arguments):
    done = subprocess.run(
        [sys.executable, "-m", f"benchmarks.{name}", "--json", "--quick", *arguments],
        cwd=ROOT,
        env=os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    lines = done.stdout.strip().splitlines()
    assert len(lines) == 1, "one JSON object and nothing else"
    return json.loads(lines[0])


@pytest.mark.slow
def test_limit():
    result = run_script("moe.limit")
    for key in ("over_gemm", "over_gemm_program", "over_gemm_ops", "over_best_gemm"):
        assert result[key] > 0
    assert set(result["rest_ms"]) == {"router", "dispatch", "combine", "metrics"}
    assert {"experts", "model_dim", "tokens", "over_gemm"} <= set(result["sweep"][0])
    assert result["dropless_over_gemm"] > 0
    assert result["decoding_over_dense"] > 0
    assert result["machine"]["cores"] >= 1


@pytest.mark.slow
def test_scaling(tmp_path):
    picture = tmp_path / "scaling.png"
    result = run_script("moe.scaling", "--plot", str(picture))
    assert result["growth"] > 0
    assert [row["experts"] for row in result["rows"]] == [4, 8]
    for row in result["rows"]:
        assert row["temporary_bytes_index"] > 0
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_peers():
    result = run_script("moe.peers", "--peers", "our one-hot einsum")
    peer = result["peers"]["our one-hot einsum"]
    assert peer["time_ratio"] > 0
    assert {"memory_ratio", "ours_megabytes", "theirs_megabytes"} <= set(peer)
    assert peer["ours_useful_tokens_per_second"] > 0
    assert not result["failed"]


def test_what_is_not_installed_is_named():
    peer = Peer(None, ("eager",), "top2", {"no-such-package": "1.0", "keras": "3"}, "")
    assert peer.missing() == ["no-such-package==1.0"]


def test_every_peer_stands_beside_one_of_ours():
    for peer in PEERS.values():
        assert peer.ours in OURS
        assert peer.work


def test_memory_is_that_beyond_the_least(monkeypatch):
    asked = []

    class Block:
        def __init__(self, block, way, shape):
            self.bytes = 900 if shape == SHAPE else 300

        def ask(self, command):
            asked.append(command)
            return self.bytes

        def close(self):
            asked.append("close")

    monkeypatch.setattr(peers, "Block", Block)
    assert peers.memory_of("top2", "jit", SHAPE) == 600
    assert asked == ["memory", "close"] * 2


def test_sides_take_turns():
    calls = []
    sides = {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}
    times = timing.alternate(sides, rounds=3)
    assert "".join(calls) == "ab" + "ab" + "ba" + "ab"
    assert {name: len(values) for name, values in times.items()} == {"a": 3, "b": 3}


def test_ratio_is_the_median_of_ratios():
    assert timing.ratio({"a": [2.0, 9.0, 4.0], "b": [1.0, 3.0, 1.0]}, "a", "b") == 3.0
    with pytest.raises(ValueError, match="rounds=0"):
        timing.alternate({}, rounds=0)


def test_layer_and_matmuls_compute_the_same_products():
    """Rows that the layer hands to its experts, through both sides."""
    layer, step = layer_step(SHAPE)
    x, dy = map(tf.constant, tokens_and_gradients(SHAPE))
    y, _, *gradients = step(x, dy)
    assert y.shape == x.shape
    shapes = [x.shape, *(w.shape for w in layer.trainable_variables)]
    assert [tuple(g.shape) for g in gradients] == [tuple(s) for s in shapes]

    x, dy, wi, wo = matmul_arguments(SHAPE)
    assert x.shape == (SHAPE.experts, SHAPE.rows, SHAPE.model_dim)
    y, dx, dwi, dwo = (
        np.asarray(a) for a in matmul_step(*map(tf.constant, (x, dy, wi, wo)))
    )
    hidden = np.maximum(x @ wi, 0)
    d_hidden = np.where(hidden > 0, dy @ wo.transpose(0, 2, 1), 0)
    np.testing.assert_allclose(y, hidden @ wo, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(
        dx, d_hidden @ wi.transpose(0, 2, 1), rtol=1e-4, atol=1e-4
    )
    np.testing.assert_allclose(
        dwi, x.transpose(0, 2, 1) @ d_hidden, rtol=1e-4, atol=1e-4
    )
    np.testing.assert_allclose(
        dwo, hidden.transpose(0, 2, 1) @ dy, rtol=1e-4, atol=1e-4
    )


def test_routing_bytes_are_those_of_the_tensors():
    layer, _ = layer_step(SHAPE)
    x, _ = tokens_and_gradients(SHAPE)
    routing, _ = layer.router(tf.constant(x), training=True)
    decision = [routing.expert_index, routing.slot, routing.weight, routing.dispatched]
    bytes_of = sum(int(tf.size(a)) * a.dtype.size for a in decision)
    maps = 4 * (
        int(tf.size(routing.slot)) + SHAPE.groups * SHAPE.experts * SHAPE.capacity
    )
    assert routing_bytes(SHAPE)["index_bytes"] == bytes_of + maps


def test_peak_memory_counts_from_its_reset():
    held = np.ones(2**25, np.uint8)  # 32 MiB
    del held
    memory.reset_peak()
    before = memory.peak()
    block = np.ones(2**25, np.uint8)
    grown = memory.peak() - before
    assert 0.9 * block.nbytes < grown < 1.5 * block.nbytes


def test_a_side_that_hangs_is_ended():
    # It waits for its standard input, and never says a word.
    with pytest.raises(served.SideError, match="sleeper ended, or was ended after 1 s"):
        served.Side("sleeper", "code", ["-q"], limit=1)
