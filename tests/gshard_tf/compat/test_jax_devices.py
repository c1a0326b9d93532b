"""jax's own functions that say which devices it will take."""

import jax
import pytest
from jax._src import hardware_utils, xla_bridge
from processes import run_python

from gshard_tf.compat.jax_devices import default_device_type, skip_accelerators


def test_is_jaxs_own_once_jax_has_started():
    assert xla_bridge.backends_are_initialized()
    assert default_device_type() == jax.devices()[0].platform.upper()


def test_does_not_start_jax():
    run_python(
        """
        import jax
        from jax._src import xla_bridge
        from gshard_tf.compat.jax_devices import default_device_type
        before = default_device_type()
        assert not xla_bridge.backends_are_initialized()
        assert before == jax.devices()[0].platform.upper()
        """,
        JAX_PLATFORMS="",
    )


@pytest.mark.parametrize(
    ("started", "platforms", "chips", "gpu", "expected"),
    [
        (False, None, 0, False, "cpu"),
        (True, None, 0, False, None),
        (False, "cuda", 0, False, "cuda"),
        (False, None, 4, False, None),
        (False, None, 0, True, None),
    ],
)
def test_skips_accelerators_only_where_there_are_none(
    monkeypatch, started, platforms, chips, gpu, expected
):
    monkeypatch.setattr(xla_bridge, "backends_are_initialized", lambda: started)
    monkeypatch.setattr(
        hardware_utils, "num_available_tpu_chips_and_device_id", lambda: (chips, None)
    )
    monkeypatch.setattr(hardware_utils, "has_visible_nvidia_gpu", lambda: gpu)
    before = jax.config.jax_platforms
    jax.config.update("jax_platforms", platforms)
    try:
        skip_accelerators()
        assert jax.config.jax_platforms == expected
    finally:
        jax.config.update("jax_platforms", before)


class _Plugin:
    name = "xla_cuda13"


@pytest.mark.parametrize(
    ("platforms", "chips", "gpu", "plugins", "kind"),
    [
        ("cpu", 4, True, [_Plugin], "CPU"),
        ("cuda,cpu", 0, False, [], "GPU"),
        ("tpu", 0, False, [], "TPU"),
        (None, 4, True, [_Plugin], "TPU"),
        (None, 0, True, [_Plugin], "GPU"),
        (None, 0, True, [], "CPU"),  # jax has no build for it
        (None, 0, False, [_Plugin], "CPU"),
    ],
)
def test_prefers_as_jax_does(monkeypatch, platforms, chips, gpu, plugins, kind):
    module = "gshard_tf.compat.jax_devices"
    monkeypatch.setattr(xla_bridge, "backends_are_initialized", lambda: False)
    monkeypatch.setattr(
        hardware_utils, "num_available_tpu_chips_and_device_id", lambda: (chips, None)
    )
    monkeypatch.setattr(hardware_utils, "has_visible_nvidia_gpu", lambda: gpu)
    monkeypatch.setattr(
        f"{module}.importlib.metadata.entry_points", lambda group: plugins
    )
    monkeypatch.setattr(f"{module}.importlib.util.find_spec", lambda name: object())
    before = jax.config.jax_platforms
    jax.config.update("jax_platforms", platforms)
    try:
        assert default_device_type() == kind
    finally:
        jax.config.update("jax_platforms", before)
