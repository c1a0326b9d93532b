import threading

import numpy as np
import pytest
from tensorflow.experimental import dtensor

import gshard_tf


def test_makes_dtensors_own_mesh():
    mesh = gshard_tf.create_mesh({"data": 4, "model": 2})
    assert isinstance(mesh, dtensor.Mesh)
    assert list(mesh.dim_names) == ["data", "model"]
    assert mesh.shape() == [4, 2] and mesh.size == 8
    assert mesh.device_type() == "CPU"
    assert list(mesh.global_device_ids().flatten()) == list(range(8))


def test_needs_no_devices():
    # The paper's machine.
    mesh = gshard_tf.create_mesh([("data", 1024), ("model", 2)], device_type="tpu")
    assert mesh.size == 2048 and mesh.device_type() == "TPU"


def test_takes_numpy_integers():
    assert gshard_tf.create_mesh({"data": np.int64(2)}).shape() == [2]


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ({}, r"at least one axis.*Received: axes=\{\}"),
        ([("a", 2), ("a", 4)], "its own name"),
        ({"a": 0}, "at least 1. Received: a=0"),
        ({"a": -8}, "at least 1. Received: a=-8"),
        ({"a": 2.0}, r"whole number.*a=2\.0"),
        ({"a": True}, "whole number.*a=True"),
        ({"a": "2"}, "whole number.*a='2'"),
        ({"a b": 2}, "must be valid identifiers. Received: 'a b'"),
        ({3: 2}, "must be valid identifiers. Received: 3"),
    ],
)
def test_refuses(axes, message):
    with pytest.raises(ValueError, match=message):
        gshard_tf.create_mesh(axes)


def test_refuses_an_unknown_device_type():
    with pytest.raises(ValueError, match="'CPU', 'GPU', 'TPU'.*device_type='NPU'"):
        gshard_tf.create_mesh({"a": 1}, device_type="NPU")


def test_use_mesh_nests_and_ends():
    outer, inner = gshard_tf.create_mesh({"a": 8}), gshard_tf.create_mesh({"b": 2})
    rules = gshard_tf.AxisRules({})
    assert gshard_tf.active_mesh() is None
    with gshard_tf.use_mesh(outer, rules):
        with gshard_tf.use_mesh(inner, rules) as active:
            assert gshard_tf.active_mesh() is active and active.mesh is inner
        assert gshard_tf.active_mesh().mesh is outer
    assert gshard_tf.active_mesh() is None
    with pytest.raises(KeyError), gshard_tf.use_mesh(outer, rules):
        raise KeyError
    assert gshard_tf.active_mesh() is None


def test_a_mesh_is_active_in_its_own_thread_only():
    seen = []
    with gshard_tf.use_mesh(gshard_tf.create_mesh({"a": 8}), gshard_tf.AxisRules({})):
        thread = threading.Thread(target=lambda: seen.append(gshard_tf.active_mesh()))
        thread.start()
        thread.join()
    assert seen == [None]
