"""jax's processes: the client that carries their messages, and their schedulers."""

import os
from typing import Any


def coordination_client() -> Any:
    """Returns the client that `jax.distributed.initialize` connected; None without it.

    Relies on: `jax._src.distributed.global_state.client`, and its methods
    `key_value_set`, `blocking_key_value_get` and `key_value_dir_get`. Messages between
    processes have no public form. On an upgrade, watch: the names of these methods, and
    `allow_overwrite` of the first.
    """
    from jax._src import distributed

    return distributed.global_state.client


def scheduled_processes(timeout: float) -> tuple[str, int, int] | None:
    """Returns what the scheduler that started this process says of the run.

    `srun` of Slurm and `mpirun` of Open MPI set environment variables, as GKE does in
    the containers of a TPU slice; the metadata server answers on a TPU VM. A job of
    Kubernetes sets `GSHARD_*` itself: jax would need the right to ask the cluster.

    Args:
        timeout: Seconds to wait for the name of a TPU's first host.

    Returns:
        The address and port of the first process, the number of processes, and this
        one's; None where no scheduler is known.

    Relies on: the classes of `jax._src.clusters`, which `jax.distributed.initialize`
    asks too. It does not say what it found before it connects. On an upgrade, watch:
    the names of the classes and of their methods.
    """
    from jax._src.clusters.cloud_tpu_cluster import GceTpuCluster, GkeTpuCluster
    from jax._src.clusters.ompi_cluster import OmpiCluster
    from jax._src.clusters.slurm_cluster import SlurmCluster

    for cluster in (SlurmCluster, OmpiCluster, GkeTpuCluster, GceTpuCluster):
        if cluster.is_env_present():
            count, index = cluster.get_process_count(), cluster.get_process_id()
            if count == 1:
                return None
            port = os.environ.get("JAX_COORDINATOR_PORT")
            address = cluster.get_coordinator_address(int(timeout), port)
            return address, count, index
    return None
