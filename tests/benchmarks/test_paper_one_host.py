"""benchmarks.paper.one_host: that it runs, and holds its own shards alone."""

import json
import subprocess
import sys

import pytest
from processes import ROOT


@pytest.mark.slow
def test_it_holds_its_own_shards():
    command = [sys.executable, "-m", "benchmarks.paper.one_host"]
    command += ["--model", "128E12L", "--process", "3", "--quick", "--json"]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(done.stdout)
    assert result["process"] == "3 of 16"
    # Two layers of 128 experts, of 2 x 1024 x 8192 weights each.
    assert result["weights"] > 2 * 128 * 2 * 1024 * 8192
    shards = result["shards_of_weights_gb"] + result["shards_of_optimizer_gb"]
    assert shards < 0.5 * result["whole_state_gb"]
    assert result["built_gb"] < 0.5 < shards
    assert result["host_over_shards"] < 1.2
