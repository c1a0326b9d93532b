"""GPUs that jax uses are hidden from TensorFlow, before it starts; a fake has them."""

import pytest
import tensorflow as tf
from processes import run_python

from gshard_tf.runtime.visible_gpus import hide_gpus_from_tensorflow

GPU = tf.config.PhysicalDevice("/physical_device:GPU:0", "GPU")


def test_without_gpus_nothing_is_set(monkeypatch):
    monkeypatch.setattr(tf.config, "set_visible_devices", None)
    hide_gpus_from_tensorflow()


def test_a_tensorflow_that_has_started_is_said(monkeypatch):
    tf.constant(1.0)
    monkeypatch.setattr(tf.config, "get_visible_devices", lambda kind: [GPU])

    def refuse(devices, kind):
        # TensorFlow's own words.
        raise RuntimeError("Visible devices cannot be modified after being initialized")

    monkeypatch.setattr(tf.config, "set_visible_devices", refuse)
    with pytest.raises(
        RuntimeError, match="before anything else uses TensorFlow.*being"
    ):
        hide_gpus_from_tensorflow()


def test_a_strategy_hides_them_before_it_starts_tensorflow():
    printed = run_python(
        """
        import tensorflow as tf
        from tensorflow.python.eager import context
        import gshard_tf
        from gshard_tf.runtime import device_arrays, devices

        gshard_tf.request_cpu_devices(2)
        device_arrays.mesh_devices = lambda mesh: devices.cpu_devices(mesh.size)
        visible = {"GPU": ["a fake"]}

        def set_visible_devices(devices, kind):
            # A real one takes memory when this is done.
            print("started:", context.context()._context_handle is not None)
            visible[kind] = devices

        tf.config.get_visible_devices = visible.get
        tf.config.set_visible_devices = set_visible_devices
        mesh = gshard_tf.create_mesh({"expert": 2}, "GPU")
        strategy = gshard_tf.SpmdStrategy(mesh)
        print(visible)
        print(strategy.run(tf.function(lambda x: x * 2.0), args=(21.0,)).numpy())
        """
    )
    assert printed.splitlines()[:2] == ["started: False", "{'GPU': []}"]
    assert "42" in printed
