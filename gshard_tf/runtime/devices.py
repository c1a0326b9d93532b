"""The devices of XLA's runtime that a mesh stands for."""

from __future__ import annotations

import importlib.util
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the runner has no TensorFlow
    from tensorflow.experimental import dtensor


def request_cpu_devices(count: int) -> None:
    """Asks for `count` virtual CPU devices; call it once, before any strategy.

    They are threads of this process: they do not make a laptop faster, they let it
    run the program of a larger machine.

    Args:
        count: How many, at least as many as the mesh has.

    Raises:
        ValueError: when `count` is not a whole number of at least 1.
        RuntimeError: when jax has already started with fewer. Nothing can change
            their number then; call this first in the program.
    """
    import jax

    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise ValueError(f"count is a whole number, at least 1. Received: {count!r}")
    try:
        jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError as error:
        found = len(jax.devices("cpu"))
        if found < count:
            raise RuntimeError(
                f"jax has already started with {found} CPU device(s), and their "
                "number cannot change any more. Call "
                f"gshard_tf.request_cpu_devices({count}) before anything else uses "
                "jax."
            ) from error


def mesh_devices(mesh: dtensor.Mesh) -> list[Any]:
    """The jax devices of a mesh, in its order.

    Raises:
        ValueError: when there are fewer than the mesh needs.
    """
    import jax

    from gshard_tf.sharding.mesh import axis_sizes

    kind = mesh.device_type().lower()
    try:
        devices = jax.devices(kind)
    except RuntimeError as error:
        raise ValueError(
            f"The mesh is over {mesh.device_type()} devices, and jax finds none here: "
            f"{error}"
        ) from error
    if len(devices) < mesh.size:
        hint = (
            f"Call gshard_tf.request_cpu_devices({mesh.size}) before anything else "
            "uses jax, or make a smaller mesh."
            if kind == "cpu"
            else "Make a smaller mesh."
        )
        raise ValueError(
            f"The mesh {axis_sizes(mesh)} needs "
            f"{mesh.size} {mesh.device_type()} devices and jax sees {len(devices)}. "
            f"{hint}"
        )
    taken = devices[: mesh.size]
    if len({device.process_index for device in taken}) < jax.process_count():
        raise ValueError(
            f"A mesh is over devices of all {jax.process_count()} processes. Received: "
            f"a mesh of {mesh.size} of {len(devices)} devices"
        )
    return taken


def cpu_devices(count: int) -> list[Any]:
    """The first `count` CPU devices of jax, which `request_cpu_devices` made."""
    import jax

    return jax.devices("cpu")[:count]


def topology_devices(name: str) -> list[Any]:
    """The devices of a TPU slice, for compiling; nothing can run on them.

    Args:
        name: As the TPU compiler names them: `"v5e:2x4"` is 8 chips of v5e, `"v3:8x8"`
            128 cores of v3.

    Returns:
        jax devices, one per core.

    Raises:
        ImportError: libtpu, which has the compiler, is not installed.
        ValueError: the compiler does not know the topology.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise ImportError(
            "Compiling for TPUs needs the compiler in libtpu: "
            "pip install 'gshard-tf[aot]'"
        )
    # libtpu otherwise looks for a TPU, or asks the metadata server of a cloud.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-8")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    # Only one process may use a TPU, but any number may compile.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    from jax.experimental import topologies

    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=name)
    except Exception as error:  # jaxlib has no narrower class for it
        raise ValueError(
            "The TPU compiler does not know this topology; names look like v5e:2x4, "
            f"v4:2x2x2 or v3:4x4. It says: {error}. Received: {name!r}"
        ) from error
    return list(found.devices)
