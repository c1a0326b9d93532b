"""Tier 1: every core of every replica holds its part, however a value came there.

On a mesh of two axes and two replicas. What a core should hold is cut out of the whole
value, which is plain Keras's or NumPy's, and not read back from the strategy.
"""

import json

import pytest
from tpu_scripts import run_script

WAYS = [
    "first values",
    *(
        method + scope + function
        for method in ("assign", "assign_add", "assign_sub")
        for scope in ("", ", in the scope")
        for function in ("", ", in a function")
    ),
    *(
        f"scatter_{kind}{function}"
        for kind in ("add", "sub", "update")
        for function in ("", ", in a function")
    ),
    *(
        f"{kind}, {source}"
        for kind in ("tf.train.Checkpoint", "CheckpointManager", ".weights.h5")
        for source in ("ours", "plain")
    ),
    ".keras, in the scope",
]


def found(mesh):
    return run_script("replicas.py", json.dumps(mesh))


@pytest.fixture(scope="module")
def two_replicas():
    return found({"data": 2, "model": 2})


@pytest.mark.parametrize("way", WAYS)
def test_every_replica_holds_its_parts_after(two_replicas, way):
    assert two_replicas["wrong"][way] == []


def test_no_way_is_left_out(two_replicas):
    assert sorted(two_replicas["wrong"]) == sorted(WAYS)
    # All kinds of layouts are among them.
    assert two_replicas["layouts"]["embedding/table"] == ["model", "data"]
    assert two_replicas["layouts"]["moe/experts/wo"] == ["data", "model", "unsharded"]
    assert two_replicas["layouts"]["outer/bias"] == ["unsharded"]


def test_a_metric_has_a_sum_in_each_replica(two_replicas):
    # TensorFlow shares a value out among the replicas, and reads their sum.
    held = {"first value": 0.0, "assign": 3.0, "zero": 0.0, "restored": 3.0}
    for when, each in held.items():
        assert two_replicas["metrics"][when] == [[[each] * 4] * 2, 2 * each], when


@pytest.mark.parametrize(
    ("path", "dims", "cores"),
    [
        # The second dimension is split over the first axis.
        ("embedding/table", [2, 2], [0, 2, 1, 3]),
        ("moe/experts/wi", [2, 1, 2], [0, 1, 2, 3]),
        ("moe/experts/wo", [2, 2, 1], [0, 1, 2, 3]),
    ],
)
def test_a_program_is_given_the_parts_in_the_order_of_its_sharding(
    two_replicas, path, dims, cores
):
    # XLA's `OpSharding` lists the core of each part, last dimension fastest; TensorFlow
    # takes the handles in that order too.
    assert two_replicas["handles"][path] == [
        {
            "replicas": [replica],
            "cores": cores,
            "dims": dims,
            "sharding": [dims, cores],
        }
        for replica in range(2)
    ]


def test_a_program_is_given_every_copy_of_what_is_whole(two_replicas):
    whole = {"replicas": [0], "cores": [0, 1, 2, 3], "dims": [], "sharding": [[], []]}
    for path in ("outer/kernel", "outer/bias", "moe/top2_router/kernel"):
        assert two_replicas["handles"][path] == [whole, {**whole, "replicas": [1]}]


def test_the_module_is_given_the_parts_in_the_order_of_the_cores(two_replicas):
    arguments = two_replicas["arguments"]
    assert set(arguments) == set(two_replicas["handles"])
    for path, argument in arguments.items():
        assert argument["inputs"] == [
            [[replica, core] for core in range(4)] for replica in range(2)
        ], path


def test_a_table_is_used_in_the_parts_that_its_rule_says(two_replicas):
    # It is stored split over both axes, and gathered over the first where it is used:
    # two parts of its rows, two copies of each.
    table = two_replicas["arguments"]["embedding/table"]
    assert table["read as"] == [[2, 1, 2], [0, 2, 1, 3]]
    # What is used as it is stored needs no annotation.
    assert two_replicas["arguments"]["moe/experts/wi"]["read as"] is None


@pytest.mark.slow
@pytest.mark.parametrize(
    "mesh", [{"expert": 4}, {"data": 4, "model": 2}, {"expert": 2}], ids=str
)
def test_other_meshes(mesh):
    run = found(mesh)
    assert run["wrong"] == {way: [] for way in WAYS}
