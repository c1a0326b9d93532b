"""jax's client of the coordination service, which carries messages of processes."""

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
