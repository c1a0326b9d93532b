"""The fuzzer of the partitioner: what it covers, what it finds, what it prints."""

import os
import re
import runpy
import subprocess
import sys

import keras
import numpy as np
import pytest
from installed_versions import KERAS
from processes import PYTHONPATH

from benchmarks import partition_fuzz
from benchmarks.fuzz import array_ops, harness, keras_ops, layer_ops, shrinking
from benchmarks.fuzz.case import make_case, names
from benchmarks.fuzz.crew import Crew

# On more than one device an annotation doubles the gradient that passes through it.
PLANTED = """
import tensorflow as tf
import gshard_tf
from gshard_tf.sharding import op_sharding
constrain = op_sharding.constrain

@tf.custom_gradient
def faulty(tensor):
    factor = 2.0 if gshard_tf.active_mesh().mesh.size > 1 else 1.0
    return tf.identity(tensor), lambda upstream: factor * upstream

def planted(tensor, sharding):
    constrained = constrain(tensor, sharding)
    return faulty(constrained) if tensor.dtype.is_floating else constrained

op_sharding.constrain = planted
"""


#: The release of Keras that the tables are of. An older one lacks some.
NEWEST = (3, 15)


def listed(excluded):
    return set(" ".join(excluded.values()).split())


def test_every_keras_op_is_covered_or_excluded():
    excluded = listed(keras_ops.EXCLUDED)
    text = " ".join(keras_ops.operations.table) + " ".join(array_ops.operations.table)
    public = {name for name in dir(keras.ops) if not name.startswith("_")}
    missing = {n for n in public - excluded if not re.search(rf"ops\.{n}\b", text)}
    assert not missing
    if KERAS >= NEWEST:
        assert excluded <= public, "excluded, and Keras does not have it"


def test_every_keras_layer_is_covered_or_excluded():
    excluded = listed(layer_ops.EXCLUDED)
    public = {
        name: made
        for name, made in vars(keras.layers).items()
        if isinstance(made, type) and issubclass(made, keras.Layer)
    }
    text = " ".join(layer_ops.operations.table)
    covered = {public[n] for n in public if re.search(rf"\b{n}\(", text)}
    # (Conv2D is Convolution2D as well.)
    missing = {n for n in public.keys() - excluded if public[n] not in covered}
    assert not missing
    if KERAS >= NEWEST:
        assert excluded <= set(public), "excluded, and Keras does not have it"


def test_a_seed_is_a_case():
    name = "window_ops: conv2d"
    assert make_case(5, name) == make_case(5, name)
    assert make_case(5, name) != make_case(6, name)


def test_every_operation_comes_once_a_round():
    jobs = partition_fuzz.jobs(3)
    drawn = [next(jobs) for _ in names()]
    assert sorted(name for _, name in drawn) == sorted(names())
    assert drawn[0][0] == 3_000_000
    with pytest.raises(ValueError, match="only='no such'"):
        next(partition_fuzz.jobs(0, "no such"))


def test_differences():
    a, b = np.float32([1.0, 2.0]), np.float32([1.0, 2.5])
    assert harness.differences([[a]], [[b]]) == [pytest.approx(0.2)]
    assert harness.differences([[a]], [[a]]) == [0.0]
    assert harness.differences([[a]], [[a[:1]]]) == [float("inf")]
    nan = np.float32([1.0, np.nan])
    assert harness.differences([[nan]], [[nan]]) == [0.0]
    assert harness.differences([[nan]], [[a]]) == [float("inf")]
    # A gradient that is the rounding of another's values.
    tiny = [np.float32([1e-9]), np.float32([2e-9])]
    assert max(harness.differences([[a, tiny[0]]], [[a, tiny[1]]])) < 1e-6
    # What should be 0 and is the rounding of numbers near 1; and what is not.
    zero, rounded, off = (np.full([2], x) for x in (0.0, 2e-7, 1e-4))
    least = harness.least_scale([np.float32([1.5, -0.5]), np.int32([70])])
    assert least == pytest.approx(0.015)
    assert max(harness.differences([[zero]], [[rounded]], least)) < harness.TOLERANCE
    assert max(harness.differences([[zero]], [[off]], least)) > harness.TOLERANCE


def test_a_few_cases():
    found = partition_fuzz.fuzz(minutes=10, seed=0, cases=4)
    assert found["cases"] >= 3
    assert found["ok"] >= (3 if KERAS >= NEWEST else 2)  # one draws a newer layer
    assert found["wrong"] == found["crashed"] == 0, found["failures"]


@pytest.mark.slow
def test_a_planted_fault_is_found_and_its_script_shows_it(tmp_path):
    found = partition_fuzz.fuzz(
        minutes=5,
        seed=0,
        only="math_ops: h * {broadcast}",
        cases=3,
        scripts=tmp_path,
        crew=Crew(preload=PLANTED),
    )
    assert found["wrong"] >= 1
    script = min(tmp_path.glob("wrong_*.py"))
    code = f"{PLANTED}\nimport runpy\nrunpy.run_path({str(script)!r}, None, '__main__')"
    faulty = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": PYTHONPATH},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert faulty.returncode == 1, faulty.stderr[-2000:]
    assert "'verdict': 'wrong'" in faulty.stdout
    # Without the fault the same script is content.
    assert shrinking.verdict(runpy.run_path(str(script)))["verdict"] == "ok"


@pytest.mark.slow
def test_a_process_that_dies_is_a_crash_and_the_next_case_runs():
    dies = """
import os
from gshard_tf.spmd import program
compiled = program.SpmdProgram.__init__
def dying(self, step, placement, *arguments, **options):
    if placement.mesh.size > 1:
        os.abort()
    compiled(self, step, placement, *arguments, **options)
program.SpmdProgram.__init__ = dying
"""
    crew = Crew(preload=dies)
    try:
        found = [crew.run(seed, "math_ops: tf.exp(h)") for seed in (1, 2)]
    finally:
        crew.close()
    for each in found:
        assert each["verdict"] == "crashed"
        assert "tf.exp(h)" in each["script"]
        assert "-6" in each["said"]


@pytest.mark.slow
def test_four_minutes():
    found = partition_fuzz.fuzz(minutes=4, seed=12)
    assert found["wrong"] == found["crashed"] == 0, found["failures"]
    assert found["ok"] > 30
