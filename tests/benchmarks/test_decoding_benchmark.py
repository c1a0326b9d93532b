"""benchmarks.decoding.speed: its arithmetic, and that it runs."""

import json
import subprocess
import sys

import numpy as np
import pytest
from processes import ROOT

from benchmarks.decoding import speed


def row(side, way, batch, p50):
    return {"side": side, "way": way, "batch": batch, "p50": p50}


def test_ratios_are_theirs_over_ours():
    rows = [
        row("ours, experts", "greedy, compiled", 1, 0.5),
        row("ours, experts", "greedy, op by op", 1, 1.0),
        row("ours, experts", "uncached, compiled", 1, 7.0),
        row("ours, experts", "beam, compiled", 1, 4.0),
        row("ours, experts", "flat beam, compiled", 1, 2.0),
        row("transformers, experts", "greedy", 1, 3.0),
        row("transformers, experts", "beam", 1, 5.0),
        row("ours, dense", "greedy, compiled", 8, 1.0),
        row("transformers, dense", "greedy", 8, 0.5),
    ]
    assert speed.ratios(rows) == {
        "uncached compiled / cached, batch 1": 14.0,
        "op by op / compiled, batch 1": 2.0,
        "beam / flat beam, batch 1": 2.0,
        "transformers / ours, experts, greedy, batch 1": 6.0,
        "transformers / ours, experts, beam, batch 1": 2.5,
        "transformers / ours, dense, greedy, batch 8": 0.5,
    }


def test_measure_counts_tokens_of_what_comes_back():
    calls = []

    def call():
        calls.append(1)
        return np.zeros([4, 9])

    found = speed.measure(call, tokens=8, seconds=0.0)
    assert found["calls"] == 3 and len(calls) == 4
    assert found["tokens_per_second"] == pytest.approx(4 * 8 / found["p50"])
    assert found["p50"] <= found["p99"]


@pytest.mark.slow
def test_it_runs():
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.decoding.speed", "--quick", "--json"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    rows = json.loads(done.stdout)["rows"]
    assert {"ours, experts", "ours, dense"} <= {row["side"] for row in rows}
