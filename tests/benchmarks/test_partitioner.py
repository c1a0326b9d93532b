"""benchmarks.partitioner: its arithmetic, and that it runs."""

import dataclasses
import json
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
from processes import ROOT

from benchmarks.partitioner import measure
from benchmarks.partitioner.cases import SEQUENCES, above_share
from benchmarks.partitioner.grids import GRIDS
from benchmarks.partitioner.images import IMAGES


def test_as_expected_means_the_same_bytes_of_each_kind_apart_from_scalars():
    found = {"all-reduce": {"count": 2, "bytes": 100_004}}
    assert measure.is_as_expected({"all-reduce": 100_000}, found)
    assert not measure.is_as_expected({"all-reduce": 90_000}, found)
    assert not measure.is_as_expected({}, found)
    assert not measure.is_as_expected({"all-gather": 5_000, "all-reduce": 1e5}, found)
    assert measure.is_as_expected({}, {"all-gather": {"count": 1, "bytes": 8}})


def test_the_ideal_is_an_equal_share_and_what_a_layout_keeps():
    def plan(arguments, temporaries):
        memory = SimpleNamespace(arguments=arguments, temporaries=temporaries)
        return SimpleNamespace(memory=memory, mesh={"x": 4, "y": 2})

    whole, split = plan(999, 8_000), plan(200, 1_900)
    case = dataclasses.replace(SEQUENCES[0], kept=300)
    assert measure.memory(case, whole, split) == {
        "memory": 2_100,
        "memory_over_share": 1.75,  # of 200 + 8000 / 8
        "memory_over_ideal": 1.4,
    }
    # Of an array in two parts a device has a half, and its share is an eighth.
    assert above_share(800, 2) == 300


def test_cases_have_names_of_their_own():
    names = [case.name for case in (*SEQUENCES, *GRIDS, *IMAGES)]
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
        assert row["memory_over_share"] >= 0.99
        assert row["memory_over_ideal"] <= row["memory_over_share"]


# One case of each section of docs/partitioning.md.
KINDS = [
    "feed-forward, FSDP",
    "feed-forward, batch split",
    "feed-forward, width split",
    "attention, length split, ring",
    "attention, length split, all-to-all",
    "experts split with groups",
    "embedding, vocabulary split",
    "images split by height, 3x3",
]


@pytest.mark.broad(len(KINDS))
@pytest.mark.parametrize("name", KINDS)
def test_the_text_of_a_plan_tells_each_kind(name):
    [case] = [case for case in [*SEQUENCES, *IMAGES] if case.name == name]
    plan = measure.planned(case, "cpu:8", 8)
    lines = str(plan).splitlines()
    [rules] = [line for line in lines if line.startswith("rules ")]
    names = [*case.rules["rules"], *(["fsdp"] if "fsdp" in case.rules else [])]
    assert set(re.findall(r"\w+", rules)) == {"rules", "x", *names}
    found = measure.communication(plan)
    assert measure.is_as_expected(case.expected, found)
    for kind in case.expected:
        told = [line for line in lines if line.startswith(f"{kind} ")]
        assert told and not any("NOT asked for" in line for line in told)
        assert any(line.endswith(" x") for line in told)
