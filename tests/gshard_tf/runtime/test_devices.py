"""Asking for devices, in processes of their own: what came first decides."""

import pytest
from processes import run_python

import gshard_tf


@pytest.mark.parametrize("count", [0, -1, 2.0, True, "8"])
def test_refuses_what_is_no_number_of_devices(count):
    with pytest.raises(ValueError, match="number of at least 1. Received: count="):
        gshard_tf.request_cpu_devices(count)


def test_asking_again_for_what_there_is():
    gshard_tf.request_cpu_devices(8)
    gshard_tf.request_cpu_devices(2)
    with pytest.raises(
        RuntimeError, match=r"started with 8 CPU device\(s\).*request_cpu_devices\(9\)"
    ):
        gshard_tf.request_cpu_devices(9)


def test_after_tensorflow_has_started():
    printed = run_python(
        """
        import tensorflow as tf
        tf.constant(1.0) + 1.0
        import gshard_tf
        gshard_tf.request_cpu_devices(3)
        strategy = gshard_tf.SpmdStrategy(gshard_tf.create_mesh({"expert": 3}))
        print(strategy.run(tf.function(lambda x: x * 2.0), args=(21.0,)))
        """
    )
    assert "42" in printed


def test_after_jax_has_started():
    printed = run_python(
        """
        import jax
        jax.numpy.ones([2]) + 1
        import gshard_tf
        try:
            gshard_tf.request_cpu_devices(4)
        except RuntimeError as error:
            print(error)
        try:
            gshard_tf.SpmdStrategy(gshard_tf.create_mesh({"expert": 4}))
        except ValueError as error:
            print(error)
        gshard_tf.request_cpu_devices(1)
        gshard_tf.SpmdStrategy(gshard_tf.create_mesh({"expert": 1}))
        """
    )
    first, second = printed.splitlines()
    assert "jax has already started with 1 CPU device(s)" in first
    assert "request_cpu_devices(4) before anything else uses jax" in first
    assert "needs 4 CPU devices and jax sees 1" in second


def test_importing_and_annotating_start_no_runtime_of_jax():
    # On a TPU VM it would take the TPU's lock away from TensorFlow. (TensorFlow Lite
    # imports jax's modules by itself, where they are installed.)
    run_python(
        """
        import gshard_tf, tensorflow as tf
        from jax._src import xla_bridge
        mesh = gshard_tf.create_mesh({"expert": 8}, device_type="TPU")
        with gshard_tf.use_mesh(mesh, gshard_tf.AxisRules.default(mesh)):
            f = tf.function(lambda x: gshard_tf.annotate(x, ("batch", None)))
            f.get_concrete_function(tf.TensorSpec([8, 2]))
        assert not xla_bridge.backends_are_initialized()
        """
    )
