"""jax devices: virtual CPU devices, devices of a mesh, and of TPU topologies."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from gshard_tf.compat.jax_devices import skip_accelerators
from gshard_tf.compat.versions import check_tensorflow_leaves_tpu
from gshard_tf.runtime.core_order import order_cores
from gshard_tf.runtime.process_group import group

if TYPE_CHECKING:  # the runner has no TensorFlow
    from tensorflow.experimental import dtensor


def request_cpu_devices(count: int) -> None:
    """Requests `count` virtual CPU devices; call it before anything uses jax.

    They are threads of this process: they do not make a laptop faster, but let it run
    the program of a larger machine. A strategy requests the devices of its mesh by
    itself, which is too late when something else has started jax.

    Args:
        count: The number of devices, at least that of the mesh.

    Raises:
        ValueError: when `count` is not a whole number of at least 1.
        RuntimeError: when jax has already started with fewer. Their number cannot
            change then; call this first in the program.
    """
    import jax

    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise ValueError(
            f"`count` must be a whole number of at least 1. Received: count={count!r}"
        )
    try:
        jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError as error:
        started = len(jax.devices("cpu"))
        if started < count:
            raise RuntimeError(
                f"jax has already started with {started} CPU device(s), and their "
                "number cannot change any more. Restart the process (in a notebook, "
                f"the kernel), and call gshard_tf.request_cpu_devices({count}) before "
                "anything else uses jax."
            ) from error


def device_count() -> int:
    """Returns the number of devices of all processes, of the type that jax takes here.

    A mesh over so many fits the machines that a run has got:
    `create_mesh({"expert": gshard_tf.device_count()})`. It starts jax, so call it after
    `initialize` and `request_cpu_devices`.

    Raises:
        RuntimeError: when jax cannot start the devices of its platform.
    """
    import jax

    skip_accelerators()
    return jax.device_count()


# jax's packages for each device type.
_PACKAGES = {
    "cpu": "jax",
    "gpu": "jax[cuda12]' or 'jax[cuda13]",
    "tpu": "jax[tpu]",
}


def _forced() -> int:
    """Returns the number of CPU devices that `XLA_FLAGS` asks for; 0: none."""
    flag = r"--xla_force_host_platform_device_count=(\d+)"
    counts = re.findall(flag, os.environ.get("XLA_FLAGS", ""))
    return int(counts[-1]) if counts else 0


def mesh_devices(mesh: dtensor.Mesh) -> list[Any]:
    """Returns the jax devices of a mesh, in its order.

    They are all devices of the first process, then those of the next; of a whole TPU
    slice as `order_cores` says.

    Before jax starts, the virtual devices of a CPU mesh are requested here.

    Raises:
        ValueError: when there are fewer than the mesh needs, or none of its type.
        ImportError: for a mesh of TPU devices, where TensorFlow would hold the TPU.
    """
    import jax

    from gshard_tf.sharding.mesh import axis_sizes

    config: Any = jax.config  # whose flags have no types
    kind = mesh.device_type().lower()
    if kind == "tpu":
        check_tensorflow_leaves_tpu()
    # Each process has as many.
    count = -(-mesh.size // group().count)
    late = ""
    if kind == "cpu":
        skip_accelerators()
    if kind == "cpu" and count > max(config.jax_num_cpu_devices, _forced()):
        try:
            request_cpu_devices(count)
        except RuntimeError as error:
            late = f" {error}"
    try:
        devices = jax.devices(kind)
    # It only asserts where it lacks the plugin of a platform.
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"The mesh is over {mesh.device_type()} devices, and jax finds none here. "
            f"{_how_to_get(kind)} Received: JAX_PLATFORMS={config.jax_platforms!r}, "
            f"{error!r}"
        ) from error
    devices = sorted(devices, key=lambda device: device.process_index)
    if jax.process_index(kind) != group().index and group().count > 1:
        raise ValueError(
            f"`process_id` must be the number that the {mesh.device_type()} runtime "
            "gives to this process: devices would be taken for another's. Received: "
            f"process_id={group().index}, and the runtime's number is "
            f"{jax.process_index(kind)}"
        )
    if len(devices) < mesh.size:
        raise ValueError(
            f"The mesh {axis_sizes(mesh)} needs {mesh.size} {mesh.device_type()} "
            f"devices and jax sees {len(devices)}. Make a smaller mesh.{late}"
        )
    used = devices[: mesh.size]
    if len({device.process_index for device in used}) < jax.process_count():
        raise ValueError(
            f"A mesh must have devices of all {jax.process_count()} processes. "
            f"Received: a mesh of {mesh.size} of {len(devices)} devices"
        )
    return order_cores(used, mesh.shape())


def _how_to_get(kind: str) -> str:
    platforms = os.environ.get("JAX_PLATFORMS")
    names = {"gpu", "cuda", "rocm"} if kind == "gpu" else {kind}
    if platforms and not names & set(platforms.split(",")):
        return f"The environment's JAX_PLATFORMS={platforms} leaves them out."
    if kind == "tpu" and importlib.util.find_spec("libtpu") is None:
        return "jax has no plugin for TPUs: pip install 'jax[tpu]'."
    return (
        "The machine must have one that no other process holds, and jax its plugin: "
        f"pip install '{_PACKAGES[kind]}'."
    )


def cpu_devices(count: int) -> list[Any]:
    """Returns the first `count` CPU devices of jax; see `request_cpu_devices`."""
    import jax

    skip_accelerators()
    return jax.devices("cpu")[:count]


def topology_devices(name: str) -> list[Any]:
    """Returns the devices of a TPU slice, for compiling; no program can run on them.

    Args:
        name: The TPU compiler's name: `"v5e:2x4"` is 8 chips of v5e, `"v3:8x8"`
            128 cores of v3.

    Returns:
        jax devices: one per core, where the two of a chip do not act as one.

    Raises:
        ImportError: libtpu, which has the compiler, is not installed.
        ValueError: the compiler does not know the topology.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise ImportError(
            "Compiling for TPUs needs the compiler in libtpu: "
            "pip install 'gshard-tf[aot]'"
        )
    from jax.experimental import topologies

    try:
        with _environment(_NO_TPU):
            topology = topologies.get_topology_desc(
                platform="tpu",
                topology_name=name,
                **_CHIP_CONFIGS.get(name.partition(":")[0], {}),
            )
    except Exception as error:  # jaxlib has no narrower class for it
        raise ValueError(
            "`name` must be a topology that the TPU compiler knows, such as v5e:2x4, "
            f"v4:2x2x2 or v3:4x4. Its error: {error}. Received: name={name!r}"
        ) from error
    return list(topology.devices)


# On a v4, jax's runtime has one device for the two cores of a chip; to compile for, it
# would have two.
_CHIP_CONFIGS = {"v4": {"chip_config_name": "megacore"}}

# libtpu reads these when it loads, and would look for a TPU, or ask the metadata server
# of a cloud. Only one process may use a TPU, but any number may compile.
_NO_TPU = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


@contextlib.contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    """Sets environment variables that are not set, for a time."""
    added = {name: value for name, value in values.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)
