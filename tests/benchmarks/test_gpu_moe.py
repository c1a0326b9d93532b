"""Saved programs of the layer, measured in a process without TensorFlow."""

import json
import os
import subprocess
import sys

import pytest
from processes import PYTHONPATH, ROOT

from benchmarks.gpu.measure import table

ALONE = """
import sys
sys.modules["tensorflow"] = sys.modules["keras"] = None
from benchmarks.gpu import measure
measure.main()
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("layers")
    command = [sys.executable, "-m", "benchmarks.gpu.export", str(folder)]
    subprocess.run(
        [*command, "--grid", "quick"], cwd=ROOT, check=True, capture_output=True
    )
    return folder


def measure(folder, *arguments):
    done = subprocess.run(
        [sys.executable, "-c", ALONE, str(folder), "--rounds", "2", *arguments],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": PYTHONPATH},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_a_folder_of_programs_is_measured_without_tensorflow(folder):
    result = json.loads(measure(folder, "--json"))
    assert result["platform"] == "cpu" and result["matmul_tflops"] > 0
    [row] = result["rows"]
    sides = row["sides"]
    assert {"index", "einsum", "jax ragged_dot"} <= set(sides)
    for name in ("index", "einsum"):
        assert 0 < sides[name]["share"] < 2
        # Weights and tokens come in, as many gradients and the output go out.
        weights, tokens = 4 * 16 * (2 * 4 * 32 + 4), 4 * 16 * 64
        memory = sides[name]["memory"]
        assert memory["arguments"] >= weights + 2 * tokens
        assert memory["results"] >= weights + 2 * tokens
    assert sides["einsum"]["over_index"] > 0
    assert "over_index" not in sides["index"]
    assert table(result).count("| 16 | 32 | 4 | 64 |") == 4
    assert (folder / "0-index.gshard").stat().st_size < 100_000
