"""Tier 1: strategies on synthetic slices; storage, files, values."""

import json

import pytest
from tpu_scripts import run_script


def results(mesh):
    return run_script("construct.py", json.dumps(mesh))


@pytest.fixture(scope="module")
def one_replica():
    return results({"expert": 8})


@pytest.fixture(scope="module")
def two_replicas():
    return results({"data": 2, "model": 2})


@pytest.fixture(params=["one_replica", "two_replicas"])
def any_mesh(request):
    return request.getfixturevalue(request.param)


def test_it_is_a_tpu_strategy(any_mesh):
    assert any_mesh["is a TPUStrategy"] is True
    assert any_mesh["types"] == ["MeshTPUVariable"]


def test_a_mesh_of_one_axis_goes_round_a_ring(one_replica):
    [cores] = one_replica["cores"]
    assert one_replica["replicas"] == 1
    steps = [
        sum(abs(a - b) for a, b in zip(here, there, strict=True))
        for here, there in zip(cores, cores[1:] + cores[:1], strict=True)
    ]
    assert steps == [1] * 8


def test_a_mesh_of_two_axes_lies_in_the_directions_of_its_box(two_replicas):
    assert two_replicas["replicas"] == 2
    for cores in two_replicas["cores"]:
        (a, b, c, d) = cores
        # The last axis along x, the first along y.
        assert [b[0] - a[0], d[0] - c[0]] == [1, 1]
        assert [c[1] - a[1], d[1] - b[1]] == [1, 1]
    assert len({tuple(c) for cores in two_replicas["cores"] for c in cores}) == 8


def test_experts_and_their_slots_are_stored_in_parts(one_replica):
    for path, (size, per_core, _) in one_replica["rows"].items():
        # The bytes of the cores' variables are those of `describe`.
        assert one_replica["bytes"][path] == per_core
        if "experts" in path:
            assert per_core * 8 == size, path
    assert sum("experts" in path for path in one_replica["rows"]) == 6
    assert set(one_replica["devices"]) == {8}


def test_several_dimensions_are_split(two_replicas):
    size, per_core, layout = two_replicas["rows"]["moe/experts/wi"]
    assert layout == ["data", None, "model"]
    assert per_core * 4 == size
    size, per_core, layout = two_replicas["rows"]["embedding/table"]
    # Its rule splits it over one axis. The other does too: TensorFlow's bridge cannot
    # write what is copied along it.
    assert layout == ["model", "data"]
    assert per_core * 4 == size
    assert two_replicas["bytes"]["embedding/table"] == per_core
    assert set(two_replicas["devices"]) == {8}


def test_it_starts_as_plain_keras_does(any_mesh):
    assert any_mesh["start"] == 0


@pytest.mark.parametrize(
    "what",
    [
        "h5",
        "h5 in scope",
        "keras",
        "keras in scope",
        "checkpoint",
        "checkpoint in scope",
        "checkpoint of plain Keras",
        "ours",
    ],
)
def test_files(any_mesh, what):
    # The difference to what was saved, here and in plain Keras.
    assert any_mesh[what] == 0


def test_checkpoints_of_ours_have_the_cores_pieces(two_replicas):
    splits = two_replicas["ours: split"]
    assert splits["model/moe/experts/wi"] == ["data", None, "model"]


@pytest.mark.parametrize("what", ["export", "export in scope"])
def test_export(any_mesh, what):
    assert isinstance(any_mesh[what], float), any_mesh[what]
    assert any_mesh[what] < 1e-6


def test_values(any_mesh):
    assert any_mesh["array"] == any_mesh["to numpy"] == [24, 16]
    assert any_mesh["rate"] == pytest.approx(0.01)
    assert any_mesh["wrong shape"].startswith("ValueError")
    assert "(3, 3)" in any_mesh["wrong shape"]


def test_refusals(any_mesh):
    assert "A TPU program is compiled by the TPU" in any_mesh["jit_compile"]
    assert "inside `with strategy.scope():`" in any_mesh["another's"]


def test_a_mesh_of_one_core_is_tensorflows_own():
    run = results({"expert": 1})
    assert run["replicas"] == 8
    assert run["is a TPUStrategy"] is True
    assert run["start"] == 0
    for what in ("h5", "checkpoint", "keras", "ours"):
        assert run[what] == 0
