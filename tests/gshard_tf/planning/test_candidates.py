"""The candidates of a search: every mesh and set of rules, each once."""

import math

import pytest

import gshard_tf
from gshard_tf.planning.search.candidates import AXES, Candidate, MeshAxis, candidates

USED = {"batch", "group", "expert", "length", "embed", "mlp", "heads", "vocab"}


def test_all_meshes_with_all_rules():
    found = list(candidates(16, USED))
    assert {math.prod(c.mesh.values()) for c in found} == {16}
    assert all(size > 1 for c in found for size in c.mesh.values())
    keys = [(*c.mesh.items(), *sorted(c.rules.items()), c.fsdp, c.zero) for c in found]
    assert len(set(keys)) == len(keys)
    # Three axes, of which any may be missing: the ways to write 16 as their product.
    assert len({tuple(c.mesh.items()) for c in found}) == 15
    for c in found:
        assert set(c.rules.values()) == set(c.mesh)  # no axis that splits nothing
        assert set(c.rules) <= USED
        if "data" in c.mesh:
            assert c.rules["batch"] == c.rules["group"] == "data"
    paper = dict.fromkeys(("batch", "group", "expert"), "data")
    for more in ({}, {"fsdp": "data"}, {"zero": "data"}):
        assert Candidate({"data": 16}, paper, **more) in found
    tensor = dict.fromkeys(("mlp", "heads", "vocab"), "model")
    assert Candidate({"data": 4, "model": 4}, paper | tensor) in found
    assert Candidate({"seq": 16}, {"length": "seq"}) in found


def test_only_what_a_model_uses():
    meshes = [c.mesh for c in candidates(8, {"batch"})]
    assert meshes == [{"data": 8}] * 3
    assert not any("expert" in c.rules for c in candidates(8, USED - {"expert"}))
    [alone] = candidates(1, USED)
    assert alone == Candidate({"data": 1}, {"batch": "data"})


def test_an_axis_of_a_new_kind_is_one_line_more():
    stages = MeshAxis("stage", together=("stage",))
    found = list(candidates(4, {"batch", "stage"}, (stages, *AXES)))
    rules = {"stage": "stage", "batch": "data"}
    assert Candidate({"stage": 2, "data": 2}, rules) in found


@pytest.mark.parametrize("more", [{}, {"fsdp": "data"}, {"zero": "data"}])
def test_the_python_text_makes_the_same_layout(more):
    rules = {"batch": "data", "mlp": "model"}
    paths = [(r".*/kernel", ("embed", None))]
    candidate = Candidate({"data": 4, "model": 2}, rules, **more)
    scope = {}
    exec(candidate.python(paths), scope)  # noqa: S102
    assert gshard_tf.request_cpu_devices(8) is None
    strategy = scope["strategy"]
    assert dict(zip(strategy.mesh.dim_names, strategy.mesh.shape(), strict=True)) == {
        "data": 4,
        "model": 2,
    }
    assert repr(strategy.rules) == repr(candidate.axis_rules(paths))
    assert strategy.rules.fsdp == more.get("fsdp")
