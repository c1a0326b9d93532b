"""benchmarks.token_loss: that it runs, and that both sides train alike."""

import json
import subprocess
import sys

import pytest
from processes import ROOT


@pytest.mark.slow
def test_it_runs():
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.token_loss", "--quick", "--json"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(done.stdout)
    for partitions in (1, 8):
        found = result[f"partitions: {partitions}"]
        assert found["ours: loss"] == pytest.approx(found["keras: loss"], rel=1e-5)
        assert found["processor, ours / keras"] > 0
