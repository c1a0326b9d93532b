"""A synthetic TPU slice, to construct strategies and trace steps without a TPU.

Its topology is real in every number; its cores are virtual CPU devices, on which
variables can be stored, saved and restored. Steps can be traced, and compiled through
`gshard_tf.testing.tpu.bridge`, but TensorFlow cannot run them.
"""

from typing import Any

import numpy as np
import tensorflow as tf

# Relies on: the metadata that a TPUStrategy gets from its resolver, which has no public
# constructor. On an upgrade, watch: its fields, and that device names still come from
# the topology's `tpu_device_name_at_coordinates`.
from tensorflow.python.client import session
from tensorflow.python.tpu import topology as tpu_topology
from tensorflow.python.tpu import tpu_system_metadata


class SyntheticTPU(tf.distribute.cluster_resolver.ClusterResolver):
    """A resolver of a slice that does not exist.

    Pass it on with its topology: `tpu_strategy(tpu, mesh, topology=tpu.topology)`.

    Args:
        shape: The slice: chips along x, y and z, and cores of a chip.
            `(2, 4, 1, 1)` is a v5e-8.

    Attributes:
        cores: The number of cores.
        topology: The topology of the slice.

    Raises:
        RuntimeError: when TensorFlow has already started with fewer CPU devices.
    """

    task_type = None
    task_id = None

    def __init__(self, shape: tuple[int, int, int, int]):
        self.cores = int(np.prod(shape))
        _request_devices(self.cores)
        self.topology = _OnCpu(serialized=serialized_topology(shape))

    def get_tpu_system_metadata(self) -> tpu_system_metadata.TPUSystemMetadata:
        prefix = "/job:localhost/replica:0/task:0/device:TPU"
        return tpu_system_metadata.TPUSystemMetadata(
            num_cores=self.cores,
            num_hosts=1,
            num_of_cores_per_host=self.cores,
            topology=self.topology,
            devices=tuple(
                session._DeviceAttributes(f"{prefix}:{i}", "TPU", 0, 0)
                for i in range(self.cores)
            ),
        )

    def master(self, *args: Any, **kwargs: Any) -> str:
        return ""

    def cluster_spec(self) -> None:
        return None

    def num_accelerators(self, *args: Any, **kwargs: Any) -> dict[str, int]:
        return {"TPU": self.cores}

    @property
    def tpu_hardware_feature(self) -> None:
        return None


def serialized_topology(shape: tuple[int, int, int, int]) -> bytes:
    """Returns the topology of a slice of one host, as a TPU system reports it.

    Args:
        shape: Chips along x, y and z, and cores of a chip. Cores are numbered along
            the chip first, then x, y and z.
    """
    # [*zyx, cores of a chip, 4] -> [1 host, cores, 4]
    places = np.moveaxis(np.indices([shape[i] for i in (2, 1, 0, 3)]), 0, -1)
    coordinates = places.reshape(1, -1, 4)[..., [2, 1, 0, 3]].astype(np.int32)
    return tpu_topology.Topology(
        mesh_shape=list(shape), device_coordinates=coordinates
    ).serialized()


class _OnCpu(tpu_topology.Topology):
    """A topology whose cores are virtual CPU devices of this process."""

    def tpu_device_name_at_coordinates(
        self, coordinates: Any, job: str | None = None
    ) -> str:
        index = self._topology_devices[tuple(coordinates)]
        return f"/job:{job or 'localhost'}/task:0/device:CPU:{index}"

    def cpu_device_name_at_coordinates(
        self, coordinates: Any, job: str | None = None
    ) -> str:
        return f"/job:{job or 'localhost'}/task:0/device:CPU:0"


def _request_devices(count: int) -> None:
    try:
        tf.config.set_logical_device_configuration(
            tf.config.list_physical_devices("CPU")[0],
            [tf.config.LogicalDeviceConfiguration()] * count,
        )
    except RuntimeError as error:
        devices = len(tf.config.list_logical_devices("CPU"))
        if devices < count:
            raise RuntimeError(
                f"A synthetic TPU of {count} cores needs as many CPU devices, and must "
                "be created before anything else uses TensorFlow. Received: "
                f"{devices} CPU device(s) of a TensorFlow that has started"
            ) from error
