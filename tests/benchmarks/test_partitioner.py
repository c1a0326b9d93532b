"""benchmarks.partitioner: its arithmetic, and that it runs."""

import json
import subprocess
import sys

import pytest
from processes import ROOT

from benchmarks.partitioner import measure
from benchmarks.partitioner.cases import SEQUENCES
from benchmarks.partitioner.images import IMAGES


def test_as_expected_means_the_same_bytes_of_each_kind_apart_from_scalars():
    found = {"all-reduce": {"count": 2, "bytes": 100_004}}
    assert measure.is_as_expected({"all-reduce": 100_000}, found)
    assert not measure.is_as_expected({"all-reduce": 90_000}, found)
    assert not measure.is_as_expected({}, found)
    assert not measure.is_as_expected({"all-gather": 5_000, "all-reduce": 1e5}, found)
    assert measure.is_as_expected({}, {"all-gather": {"count": 1, "bytes": 8}})


def test_cases_have_names_of_their_own():
    names = [case.name for case in (*SEQUENCES, *IMAGES)]
    assert len(set(names)) == len(names) > 20


@pytest.mark.slow
def test_it_runs():
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.partitioner", "--quick", "--json"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(rows) == 2
    for row in rows:
        assert row["as_expected"] and row["max_rel"] < 1e-5
        assert row["memory_over_ideal"] >= 0.99
