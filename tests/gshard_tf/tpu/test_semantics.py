"""Tier 2: the results of `fit`, through TensorFlow's TPU bridge and XLA's partitioner.

The program is that of the strategy, traced by TensorFlow for a TPU; each of eight CPU
devices is given the shards of one core. The oracle is plain Keras.
"""

import json

import keras
import numpy as np
import pytest
import tensorflow as tf
from tpu_scripts import run_script

# Each case is a process of its own, of half a minute; the first is in every run.
slow = pytest.mark.slow

CLOSE = 1e-6


def results(mesh, optimizer, dropout=0.0, per_execution=1):
    return run_script("fit.py", json.dumps(mesh), optimizer, dropout, per_execution)


@pytest.fixture(scope="module")
def one_replica():
    return results({"expert": 8}, "adam", 0.1)


def assert_as_plain_keras(run):
    assert max(run["logs"].values()) < CLOSE, run["logs"]
    assert run["weights"] < CLOSE
    assert run["slots"] < CLOSE
    assert run["moved"] > 1e3 * CLOSE
    assert run["files"] == run["their files"] != []
    assert run["executions"] == run["their executions"] != []


def test_fit_with_dropout_and_callbacks(one_replica):
    assert_as_plain_keras(one_replica)
    assert {"loss", "mae", "moe_dropped", "learning_rate"} <= set(one_replica["names"])


@pytest.mark.slow
def test_a_step_on_several_replicas_of_two_axes():
    run = run_script("tiny_step.py", json.dumps({"data": 2, "model": 2}))
    assert run["size"] == [2, 4]
    # A table in four parts, which the step gathers to two.
    assert run["layout"] == ["model", "data"]
    ours, theirs = run["losses"]
    assert ours == pytest.approx(theirs, abs=CLOSE)
    assert run["difference"] < CLOSE
    assert run["moved"] > 1e3 * CLOSE
    # Each replica has its own number, and each core of each its own part.
    assert run["numbers"] == [1.0 + 2.0] * 2
    assert run["wrong"] == []


@slow
@pytest.mark.parametrize("cores", [4, 2])
def test_fit_on_several_replicas(cores):
    # Also what is random: dropout, and who has a second expert.
    run = results({"expert": cores}, "adam", 0.1)
    assert run["size"] == [8 // cores, cores]
    assert_as_plain_keras(run)


@slow
@pytest.mark.parametrize(
    ("mesh", "optimizer"),
    [
        ({"data": 4, "model": 2}, "adafactor"),
        ({"data": 4, "model": 2}, "sparse"),
        ({"data": 4, "model": 2}, "sparse adam"),
        ({"expert": 8}, "momentum"),
        ({"expert": 8}, "accumulation"),
        ({"expert": 8}, "average"),
    ],
)
def test_fit_with_other_optimizers(mesh, optimizer):
    run = results(mesh, optimizer)
    assert_as_plain_keras(run)
    for path, share in run["shares"].items():
        if "experts_w" in path or "experts/w" in path:
            assert share == 1 / 8, path


@slow
def test_steps_per_execution():
    # Four steps an epoch, two of them in one execution: Keras's own loop.
    run = results({"expert": 8}, "adam", 0.1, 2)
    assert_as_plain_keras(run)
    assert len(run["executions"]) == 3 * 2
    assert run["iterations"] == 3 * 4


def test_adam_squares_each_duplicate_row_of_a_sparse_gradient():
    # Keras itself, with no strategy: why a table that is gathered under TPUStrategy,
    # where gradients are dense, is compared with one whose gradient is dense.
    rows, values = [1, 1, 2], np.array([[1.0], [2.0], [4.0]], "float32")
    sparse = tf.IndexedSlices(
        tf.constant(values), tf.constant(rows), tf.constant([3, 1])
    )
    velocity = {}
    for kind, gradient in [("sparse", sparse), ("dense", tf.convert_to_tensor(sparse))]:
        table = keras.Variable(np.zeros([3, 1], "float32"))
        adam = keras.optimizers.Adam()
        adam.apply([gradient], [table])
        velocity[kind] = keras.ops.convert_to_numpy(adam._velocities[0])[:, 0]
    share = 1 - 0.999
    np.testing.assert_allclose(velocity["sparse"], share * np.array([0, 5, 16]), 1e-4)
    np.testing.assert_allclose(velocity["dense"], share * np.array([0, 9, 16]), 1e-4)


def test_the_program(one_replica):
    assert one_replica["size"] == [1, 8]
    assert one_replica["use_spmd"] is True
    # The host reads and writes variables, and that is all.
    assert one_replica["host"] == ["tf.TPUCompilationResult"]
    # Two weights with two slots each, and their new values.
    assert one_replica["split arguments"] == 6
    assert one_replica["split updates"] == 6


def test_inputs_arrive_in_parts(one_replica):
    assert len(one_replica["inputs"]) == 2
    assert all(one_replica["inputs"])


def test_what_is_communicated(one_replica):
    shapes = [s for kind, s in one_replica["collectives"] if kind == "all-to-all"]
    # There and back, the same for the gradient; and TensorFlow's own, a number for each
    # replica: which is which, to take the first one's seeds.
    assert sorted(len(shape) for shape, *_ in shapes) == [1, 5, 5, 5, 5]
    assert [[1]] in shapes
    # No weight is gathered, and nothing else.
    kinds = {kind for kind, _ in one_replica["collectives"]}
    assert kinds == {"all-to-all", "all-reduce"}
