"""Connecting to a TPU, as far as a machine without one goes."""

import importlib.metadata

import pytest
import tensorflow as tf

from gshard_tf.tpu.system import connect

TOPOLOGY = tf.tpu.experimental.Topology(
    mesh_shape=[1, 1, 1, 1], device_coordinates=[[[0, 0, 0, 0]]]
)


@pytest.fixture(autouse=True)
def mlir_bridge(monkeypatch):
    """Notes that the bridge is switched on, and leaves it off for other tests."""
    calls = []
    monkeypatch.setattr(
        tf.config.experimental, "enable_mlir_bridge", lambda: calls.append(True)
    )
    return calls


def test_a_system_that_was_initialized_is_taken_as_it_is(mlir_bridge):
    resolver = tf.distribute.cluster_resolver.SimpleClusterResolver(
        tf.train.ClusterSpec({"worker": ["localhost:1"]})
    )
    assert connect(resolver, TOPOLOGY) == (resolver, TOPOLOGY)
    assert mlir_bridge


@pytest.mark.parametrize("tpu", ["local", None])
def test_a_topology_needs_its_resolver(tpu):
    with pytest.raises(ValueError, match=f"must be the resolver .*tpu={tpu!r}"):
        connect(tpu, TOPOLOGY)


@pytest.mark.parametrize("tpu", ["local", "", None])
def test_a_tpu_of_this_machine_needs_the_wheel_for_it(monkeypatch, tpu):
    def version(package):
        if package == "tensorflow-tpu":
            raise importlib.metadata.PackageNotFoundError
        return "2.20.0"

    monkeypatch.setattr(importlib.metadata, "version", version)
    with pytest.raises(ImportError, match="tensorflow-tpu==.* 2.20.0, which has no"):
        connect(tpu)
