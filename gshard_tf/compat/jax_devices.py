"""The kind of device that jax will take, known before jax starts."""

import importlib.metadata
import importlib.util
import os
from typing import Any

# Names of `JAX_PLATFORMS`; the same kind of device may have several.
_KINDS = {"cuda": "GPU", "rocm": "GPU", "gpu": "GPU", "tpu": "TPU", "cpu": "CPU"}


def default_device_type() -> str:
    """Returns the type of `jax.devices()[0]`: `"CPU"`, `"GPU"` or `"TPU"`.

    It does not start jax, whose number of CPU devices could not be chosen any more, and
    which would take a TPU away from TensorFlow.

    Relies on: `jax._src.xla_bridge.backends_are_initialized`, and, for what jax would
    find, the functions of `jax._src.hardware_utils` that jax asks itself. The entry
    points `jax_plugins` are public: a build of jax for GPUs has one. On an upgrade,
    watch: these names, and whether jax still prefers TPUs, then GPUs, then CPUs.
    """
    import jax
    from jax._src import hardware_utils, xla_bridge

    if xla_bridge.backends_are_initialized():
        return _KINDS.get(jax.default_backend(), "CPU")
    config: Any = jax.config  # whose flags have no types
    platforms = config.jax_platforms
    if platforms:
        return _KINDS.get(platforms.partition(",")[0], "CPU")
    chips, _ = hardware_utils.num_available_tpu_chips_and_device_id()
    if chips and importlib.util.find_spec("libtpu") is not None:
        return "TPU"
    plugins = " ".join(_plugins())
    if "cuda" in plugins and hardware_utils.has_visible_nvidia_gpu():
        return "GPU"
    if "rocm" in plugins and os.path.exists("/dev/kfd"):
        return "GPU"
    return "CPU"


def _plugins() -> list[str]:
    return [each.name for each in importlib.metadata.entry_points(group="jax_plugins")]


def skip_accelerators() -> None:
    """Keeps jax from looking for accelerators on a machine that has none.

    libtpu, which plans need, writes a page of errors where there is no TPU. Nothing is
    changed once jax has started, where `JAX_PLATFORMS` is set or jax has a plugin, or
    where there is an accelerator, though jax may lack a build for it, as it then says.

    Relies on: what `default_device_type` does.
    """
    import jax
    from jax._src import hardware_utils, xla_bridge

    config: Any = jax.config
    chips, _ = hardware_utils.num_available_tpu_chips_and_device_id()
    if not (
        xla_bridge.backends_are_initialized()
        or config.jax_platforms
        or _plugins()
        or chips
        or hardware_utils.has_visible_nvidia_gpu()
    ):
        config.update("jax_platforms", "cpu")
