"""Tiers 3 and 4: requests that reach a TPU's host, and the TPU's compiler on them.

The host is a stand-in: it speaks TensorFlow's protocol, reports a TPU, and logs every
request. The client is unmodified.
"""

import importlib.util
import json

import pytest
from tpu_scripts import run_script

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs libtpu: the extra aot"
)


@pytest.fixture(scope="module")
def one_replica():
    return run_script("protocol.py", json.dumps({"expert": 8}), "v5e:2x4")


@pytest.mark.slow
def test_a_mesh_of_two_axes():
    run = run_script("protocol.py", json.dumps({"data": 2, "model": 2}))
    assert [run["replicas"], run["cores"]] == [2, 4]
    assert_executed(run)


def assert_executed(run):
    assert not run["errors"]
    assert {"loss", "mae", "moe_dropped"} <= set(run["logs"])
    # Two epochs of two steps, each of which every core executes.
    cores = sorted(core for core, _, _ in run["executions"])
    assert cores == sorted(4 * [str(i) for i in range(8)])
    for core, given, count in run["executions"]:
        # A core is given its own shards, and those of no other.
        assert given == [core] and count > 10


def test_the_program_that_arrives(one_replica):
    assert [one_replica["replicas"], one_replica["cores"]] == [1, 8]
    assert one_replica["use_spmd"] is True


def test_its_shardings(one_replica):
    split = [
        dims for shape, dims, _ in one_replica["arguments"] if len(shape) == 3 and dims
    ]
    # Two weights of the experts with two slots each, and the labels.
    assert split.count([8, 1, 1]) == 7
    assert one_replica["results"].count([8, 1, 1]) == 6


def test_the_order_of_the_cores(one_replica):
    # Cores are numbered along x, then y, in the stand-in's topology.
    expected = [
        [x + 2 * y for x, y, _, _ in cores] for cores in one_replica["coordinates"]
    ]
    assert one_replica["assigned"] == expected


def test_every_core_executes_on_its_own_parts(one_replica):
    assert one_replica["execute operations"] == ["TPUExecuteAndUpdateVariables"]
    assert_executed(one_replica)


@needs_libtpu
def test_the_tpus_compiler_takes_it_and_needs_what_the_plan_says(one_replica):
    assert_compiled(one_replica, "v5e:2x4")


@pytest.mark.slow
@needs_libtpu
def test_the_compiler_of_another_tpu_too():
    run = run_script("protocol.py", json.dumps({"expert": 8}), "v4:2x2x2")
    assert_compiled(run, "v4:2x2x2")


def assert_compiled(run, name):
    assert run["left"] == []
    arguments, temporaries = run[f"memory {name}"]
    planned, planned_temporaries = run[f"plan {name}"]
    assert arguments == planned > 0
    # The plan's module is Keras's step as SpmdStrategy lowers it. What the compiler
    # fuses may differ a little.
    assert temporaries == pytest.approx(planned_temporaries, rel=0.05)
