"""Keras 2 and the Model Garden on meshes of 1, 2 and 8 devices, against one device."""

import importlib
import importlib.util

import pytest

from benchmarks.keras_parity import keras_cases
from benchmarks.keras_parity.case import MESHES, Run, compare, difference, run

QUICK = ("methods", "own_step", "callbacks", "float16", "own_loop")


def agrees(case, module, devices):
    found = run(case, module, devices)
    worst = compare(found, run(case, module))
    assert worst <= case.tolerance, worst
    assert (found.split > 0) == (devices > 1), found.split


def cases(names, quick, devices):
    """Cases on each mesh; those of `quick` on the largest alone are not slow."""
    return [
        pytest.param(
            name,
            count,
            marks=[] if name in quick and count == 8 else [pytest.mark.slow],
            id=f"{name}-{count}",
        )
        for name in names
        for count in devices
    ]


@pytest.mark.parametrize(("name", "devices"), cases(keras_cases.CASES, QUICK, MESHES))
def test_keras_2_on_a_mesh_is_keras_2(name, devices):
    tf_keras = pytest.importorskip("tf_keras")
    agrees(keras_cases.CASES[name], tf_keras, devices)


@pytest.mark.slow
@pytest.mark.parametrize("name", keras_cases.CASES)
def test_keras_3_passes_the_same_cases(name):
    agrees(keras_cases.CASES[name], importlib.import_module("keras"), 8)


GARDEN = (
    "bert",
    "bert_clipped",
    "resnet",
    "lamb",
    "lars",
    "averages",
    "orbit",
    "experiment",
)


@pytest.mark.skipif(
    importlib.util.find_spec("official") is None,
    reason="tf-models-official: pip install -e '.[model-garden]'",
)
@pytest.mark.parametrize(("name", "devices"), cases(GARDEN, GARDEN, MESHES))
def test_the_model_garden_on_a_mesh_is_that_of_one_device(name, devices):
    from benchmarks.keras_parity import model_garden

    assert tuple(sorted(model_garden.CASES)) == tuple(sorted(GARDEN))
    agrees(model_garden.CASES[name], importlib.import_module("tf_keras"), devices)


def test_a_difference_is_seen():
    one = {"loss": [1.0, 2.0], "text": "a", "none": None}
    assert difference(one, one) == 0.0
    assert difference(one | {"loss": [1.0, 2.002]}, one) == pytest.approx(
        1e-3, rel=0.01
    )
    assert difference(one | {"text": "b"}, one) == float("inf")
    assert difference(one | {"loss": [1.0]}, one) == float("inf")
    assert difference({"loss": [1.0, 2.0]}, one) == float("inf")
    assert difference([float("nan")], [1.0]) == float("inf")
    assert compare(Run([1.0], {"w": 2.0}), Run([1.0], {"w": 1.0})) == 1.0
