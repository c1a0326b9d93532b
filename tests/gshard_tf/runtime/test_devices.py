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
    assert gshard_tf.device_count() == 8
    with pytest.raises(
        RuntimeError,
        match=r"started with 8 CPU device\(s\).*Restart.*request_cpu_devices\(9\)",
    ):
        gshard_tf.request_cpu_devices(9)


def test_a_strategy_requests_the_devices_of_its_mesh():
    printed = run_python(
        """
        import tensorflow as tf
        tf.constant(1.0) + 1.0
        import gshard_tf, jax
        jax.config.update("jax_num_cpu_devices", 1)  # as if for a smaller mesh
        strategy = gshard_tf.SpmdStrategy(gshard_tf.create_mesh({"expert": 3}))
        print(strategy.run(tf.function(lambda x: x * 2.0), args=(21.0,)))
        print(len(jax.devices()))
        assert jax.config.jax_platforms == "cpu"  # no TPU was looked for
        try:
            gshard_tf.SpmdStrategy(gshard_tf.create_mesh({"expert": 4}))
        except ValueError as error:
            print(error)
        gshard_tf.request_cpu_devices(1)
        gshard_tf.SpmdStrategy(gshard_tf.create_mesh({"expert": 1}))
        """,
        JAX_PLATFORMS="",
    )
    value, count, late = printed.splitlines()
    assert "42" in value and count == "3"
    assert "needs 4 CPU devices and jax sees 3. Make a smaller mesh" in late
    assert "jax has already started with 3 CPU device(s)" in late
    assert "(in a notebook, the kernel), and call gshard_tf.request_cpu_devices(4)" in (
        late
    )


def test_a_strategy_takes_the_devices_that_xla_was_told_to_make():
    run_python(
        """
        import gshard_tf, jax
        gshard_tf.SpmdStrategy(gshard_tf.create_mesh({"expert": 1}))
        assert len(jax.devices()) == 2
        """,
        XLA_FLAGS="--xla_force_host_platform_device_count=2",
    )


def test_platforms_that_are_not_there():
    printed = run_python(
        """
        import gshard_tf
        mesh = gshard_tf.create_mesh({"expert": 2})
        print(mesh.device_type())
        for mesh in (mesh, gshard_tf.create_mesh({"expert": 2}, "CPU")):
            try:
                gshard_tf.SpmdStrategy(mesh)
            except ValueError as error:
                print(error)
        """,
        JAX_PLATFORMS="cuda",
    )
    kind, *errors = printed.splitlines()
    assert kind == "GPU"
    for error, kind in zip(errors, ("GPU", "CPU"), strict=True):
        assert f"over {kind} devices, and jax finds none" in error
        assert "Received: JAX_PLATFORMS='cuda'" in error
        # More packages would not help a mesh of CPU devices.
        assert ("JAX_PLATFORMS=cuda leaves them out" in error) == (kind == "CPU")
        assert ("pip install" in error) == (kind == "GPU")


def test_another_backend_of_keras():
    printed = run_python(
        """
        import gshard_tf
        try:
            gshard_tf.create_mesh({"expert": 2})
        except ImportError as error:
            print(error)
        """,
        KERAS_BACKEND="torch",  # installed or not
    )
    assert "KERAS_BACKEND=tensorflow" in printed


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
