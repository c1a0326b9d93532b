"""benchmarks.platforms: that it runs, and that its stand-in device keeps time."""

import importlib.util
import json
import subprocess
import sys

import numpy as np
import pytest
from processes import ROOT

from benchmarks.platforms import overhead


def test_the_stand_in_device_runs_one_step_after_the_other(monkeypatch):
    clock = [10.0]
    monkeypatch.setattr(overhead.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(
        overhead.time, "sleep", lambda s: clock.__setitem__(0, clock[0] + s)
    )
    monkeypatch.setattr(
        overhead.SpmdProgram, "__call__", lambda *_: ([np.float32(5)], [])
    )
    device = overhead.Device()
    with device.runs_steps():
        first, second = (
            overhead.SpmdProgram.__call__(None, [], [])[0][0] for _ in "12"
        )
        assert not first.is_ready()
        assert float(np.asarray(first)) == 5 and clock[0] == pytest.approx(10.02)
        assert first.is_ready() and not second.is_ready()
        np.asarray(second)
        assert clock[0] == pytest.approx(10.04)
        clock[0] += 0.003  # what the host takes
        overhead.SpmdProgram.__call__(None, [], [])
    assert device.gaps[1:] == pytest.approx([0, 0.003])


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs libtpu: the extra aot"
)
def test_it_runs():
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.platforms", "--quick", "--json"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(done.stdout)
    assert result["lowered"] >= 10
    assert (
        result["compiled_for_tpu"] == result["exported_for_cuda"] == result["lowered"]
    )
    assert set(result["host_bytes_over_shards"]) == {
        f"processes={n}" for n in (1, 2, 4)
    }
    assert result["overhead_ms_per_step"]["steps_per_execution=8"] >= 0
    assert min(result["cpu_ms_per_step"].values()) > 0
