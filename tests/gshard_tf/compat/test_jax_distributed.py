"""jax's client has the methods that messages need, and jax knows schedulers."""

import pytest
from jax._src.clusters import cloud_tpu_cluster
from processes import run_python

from gshard_tf.compat.jax_distributed import coordination_client, scheduled_processes


def test_one_process_has_no_client():
    assert coordination_client() is None


def test_the_client_passes_messages():
    run_python(
        """
        import socket
        import jax
        from gshard_tf.compat.jax_distributed import coordination_client
        with socket.create_server(("127.0.0.1", 0)) as listening:
            port = listening.getsockname()[1]
        jax.distributed.initialize(f"127.0.0.1:{port}", 1, 0)
        client = coordination_client()
        client.key_value_set("a/b", "1", allow_overwrite=True)
        client.key_value_set("a/b", "2", allow_overwrite=True)
        assert client.blocking_key_value_get("a/b", 1000) == "2"
        assert client.key_value_dir_get("a/") == [("a/b", "2")]
        """
    )


SLURM = {
    "SLURM_JOB_ID": "4097",
    "SLURM_STEP_NODELIST": "node[003-004,7],other",
    "SLURM_NTASKS": "3",
    "SLURM_PROCID": "2",
    "SLURM_LOCALID": "0",
}
OPEN_MPI = {
    "OMPI_MCA_orte_hnp_uri": "8192.0;tcp://10.96.0.1,10.148.0.1:34911",
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
}
POD_SLICE = {
    "TPU_WORKER_ID": "1",
    "TPU_WORKER_HOSTNAMES": "localhost,elsewhere",
    # What is not there, the metadata server is asked for.
    "MEGASCALE_COORDINATOR_ADDRESS": "",
    "MEGASCALE_NUM_SLICES": "",
    "MEGASCALE_SLICE_ID": "",
}


@pytest.mark.parametrize(
    ("environ", "found"),
    [
        (SLURM, ("node003:61441", 3, 2)),
        (SLURM | {"JAX_COORDINATOR_PORT": "99"}, ("node003:99", 3, 2)),
        (SLURM | {"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, None),
        # A batch script, outside of srun.
        ({k: v for k, v in SLURM.items() if "STEP" not in k}, None),
        (OPEN_MPI, ("10.96.0.1:61442", 2, 1)),
        (POD_SLICE, ("localhost:8482", 2, 1)),
        ({}, None),
    ],
)
def test_schedulers_say_who_is_who(monkeypatch, environ, found):
    for name in {*SLURM, *OPEN_MPI, *POD_SLICE}:
        monkeypatch.delenv(name, raising=False)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    on_tpu = environ is POD_SLICE
    monkeypatch.setattr(cloud_tpu_cluster, "running_in_cloud_tpu_vm", on_tpu)
    assert scheduled_processes(5) == found
