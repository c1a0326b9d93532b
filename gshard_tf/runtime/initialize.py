"""`initialize`: joins the processes of a run.

Every host runs the same script, which calls `initialize` first.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
import threading
from collections.abc import Iterator

from gshard_tf.compat.jax_distributed import coordination_client, scheduled_processes
from gshard_tf.compat.versions import tensorflow_tpu_version
from gshard_tf.runtime.process_group import ProcessGroup, run_state
from gshard_tf.runtime.relay import Relay
from gshard_tf.runtime.watchdog import (
    ABORTED_BY_ANOTHER,
    Watchdog,
    abort,
    abort_all_and_exit,
)

# jax aborts, with a stack of C++, each process that survives one it takes for dead.
# `Watchdog` handles that here, so jax waits longer than any run takes.
_NEVER_SECONDS = 10**7


def initialize(
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    step_timeout: float = 300,
    heartbeat_timeout: float = 30,
    quiet: bool = True,
) -> ProcessGroup:
    """Joins the processes of a run; every one of them calls it first.

    ```bash
    GSHARD_COORDINATOR=host0:8476 GSHARD_PROCESSES=2 GSHARD_PROCESS=0 python train.py
    ```

    Where a scheduler starts the processes (`srun` of Slurm, `mpirun` of Open MPI, a pod
    slice of TPUs), it says all three, and nothing need be given.

    Their devices, in the order of the processes, are those of a mesh. When one process
    fails, all end: each with the message of the one that failed.

    Args:
        coordinator_address: Address and port of the first process, which the others
            can reach. Defaults to the environment's `GSHARD_COORDINATOR`.
        num_processes: The number of processes. Defaults to `GSHARD_PROCESSES`. When
            neither is given, a scheduler says it; without one it is 1, and nothing
            happens.
        process_id: The number of this process, from 0. Defaults to `GSHARD_PROCESS`.
        step_timeout: Seconds in one step after which a process reports which others
            hold it up, and ends the run. It must be longer than the longest
            compilation. A process waits this long for the others to join, too, and
            then exits with code 70.
        heartbeat_timeout: Seconds without a message after which a process counts as
            dead. (One that dies in the middle of a step is noticed at once, and one
            that ends while others need it after about a second.)
        quiet: Whether only the first process writes to the standard output. All of
            them write errors.

    Returns:
        The group; its `is_chief` says which process writes logs.

    Raises:
        ValueError: when the arguments contradict each other.
        RuntimeError: when jax has already started.
    """
    environ = os.environ
    if num_processes is None and "GSHARD_PROCESSES" in environ:
        num_processes = int(environ["GSHARD_PROCESSES"])
    if process_id is None and "GSHARD_PROCESS" in environ:
        process_id = int(environ["GSHARD_PROCESS"])
    address = coordinator_address or environ.get("GSHARD_COORDINATOR")
    given = address, num_processes, process_id
    # With TensorFlow for TPUs one process drives all hosts, and jax must stay away.
    if given == (None, None, None) and tensorflow_tpu_version() is None:
        given = scheduled_processes(step_timeout) or given
    address, num_processes, process_id = given
    num_processes = 1 if num_processes is None else num_processes
    process_id = process_id or 0
    if num_processes < 1:
        raise ValueError(
            "`num_processes` must be at least 1. Received: "
            f"num_processes={num_processes}"
        )
    if not 0 <= process_id < num_processes:
        raise ValueError(
            "`process_id` must be in [0, num_processes). Received: "
            f"process_id={process_id}, num_processes={num_processes}"
        )
    if num_processes == 1:
        return run_state().group
    if not address:
        raise ValueError(
            "`coordinator_address` must be the 'host:port' of the first process, or "
            "set GSHARD_COORDINATOR. Received: coordinator_address=None"
        )
    import jax

    if quiet and process_id:
        # The file itself: gloo's connections write to it, and they are no Python.
        devnull = os.open(os.devnull, os.O_WRONLY)
        os.dup2(devnull, 1)
        os.close(devnull)
    # jax's service would take SIGTERM for itself, and report it only when asked.
    jax.config.update("jax_enable_preemption_service", False)
    # On CPUs; GPUs have NCCL.
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    relay = None
    if process_id:
        host, _, port = address.rpartition(":")
        relay = Relay(host.strip("[]"), int(port), heartbeat_timeout)
    with _join_timeout(
        f"process {process_id} of {num_processes} has waited {step_timeout:g} s for "
        f"the others at {address}: give all of them this address and this number of "
        "processes",
        step_timeout,
    ):
        jax.distributed.initialize(
            coordinator_address=address if relay is None else relay.address,
            num_processes=num_processes,
            process_id=process_id,
            # It would give each process of Slurm one GPU, by its number on its host.
            cluster_detection_method="deactivate",
            initialization_timeout=_NEVER_SECONDS,
            heartbeat_timeout_seconds=_NEVER_SECONDS,
            shutdown_timeout_seconds=int(heartbeat_timeout),
        )
    run = run_state()
    run.group = ProcessGroup(process_id, num_processes, coordination_client())
    watchdog = Watchdog(run, relay, step_timeout, heartbeat_timeout)
    sys.excepthook = abort_all_and_exit
    # Before jax's own, which was registered earlier, disconnects.
    atexit.register(watchdog.leave)
    watchdog.start()
    return run.group


@contextlib.contextmanager
def _join_timeout(text: str, seconds: float) -> Iterator[None]:
    """Ends this process, with a text, unless the block ends in time.

    jax would end a wait for the other processes by aborting, with a stack of C++.
    """
    joined = threading.Event()

    def wait() -> None:
        if not joined.wait(seconds):
            abort(text, ABORTED_BY_ANOTHER, notify=False)

    threading.Thread(target=wait, daemon=True).start()
    try:
        yield
    finally:
        joined.set()
