"""Meshes: named grids of devices, and which one is active.

The types are DTensor's own `Mesh` and `Layout`. A mesh needs no device to exist,
so the same type describes virtual CPU devices, GPUs and a TPU slice that is not rented
yet.
"""

import contextlib
import contextvars
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import tensorflow as tf
from tensorflow.experimental import dtensor

from gshard_tf.compat.jax_devices import default_device_type
from gshard_tf.layouts.partition_spec import parts_over

if TYPE_CHECKING:
    from gshard_tf.sharding.rules import AxisRules

DEVICE_TYPES = ("CPU", "GPU", "TPU")


def create_mesh(
    axes: Mapping[str, int] | Sequence[tuple[str, int]],
    device_type: str | None = None,
) -> dtensor.Mesh:
    """Makes a `dtensor.Mesh` of named axes, without asking for the devices.

    `create_mesh({"expert": 8})` is the paper's mesh: one axis over which tokens,
    groups and experts are all split. `create_mesh({"data": 4, "model": 2})` splits
    tokens and experts four ways and the hidden width of each expert two ways.

    Args:
        axes: Names and sizes, outermost first. Neighbours on the *last* axis are
            neighbours on the interconnect, so put there what communicates most.
        device_type: `"CPU"`, `"GPU"` or `"TPU"`. Defaults to what jax takes here
            (`JAX_PLATFORMS`, else a TPU, a GPU, or the CPU), which is found out without
            starting jax. A strategy over the mesh of a CPU asks for its devices.

    Returns:
        A `tf.experimental.dtensor.Mesh`; partition `i` is device `i` of that type.
        `mesh.device_type()` says which that is.

    Raises:
        ValueError: for no axis, a repeated name, a size below 1 or an unknown
            device type.
    """
    pairs = list(axes.items()) if isinstance(axes, Mapping) else list(axes)
    names = [name for name, _ in pairs]
    if not pairs or len(set(names)) != len(names):
        raise ValueError(
            "A mesh needs at least one axis, each with its own name, such as "
            f'{{"expert": 8}}. Received: axes={axes}'
        )
    for name, size in pairs:
        if not isinstance(name, str) or not name.isidentifier():
            raise ValueError(
                f"Mesh axis names must be valid identifiers. Received: {name!r}"
            )
        if isinstance(size, bool) or not isinstance(size, int | np.integer) or size < 1:
            raise ValueError(
                "The size of a mesh axis must be a whole number of at least 1. "
                f"Received: {name}={size!r}"
            )
    kind = default_device_type() if device_type is None else str(device_type).upper()
    if kind not in DEVICE_TYPES:
        raise ValueError(
            f"`device_type` must be one of {DEVICE_TYPES}. "
            f"Received: device_type={device_type!r}"
        )
    sizes = [int(size) for _, size in pairs]
    count = int(np.prod(sizes))
    devices = [
        tf.DeviceSpec(
            job="localhost", replica=0, task=0, device_type=kind, device_index=i
        )
        for i in range(count)
    ]
    ids = np.arange(count).reshape(sizes)
    return dtensor.Mesh(names, ids, list(range(count)), devices)


def axis_sizes(mesh: dtensor.Mesh) -> dict[str, int]:
    """The number of devices along each axis of a mesh, outermost first."""
    return dict(zip(mesh.dim_names, mesh.shape(), strict=True))


@dataclasses.dataclass(frozen=True)
class ActiveMesh:
    """A mesh and the rules that turn logical axes into its axes."""

    mesh: dtensor.Mesh
    rules: "AxisRules"

    def parts(self, logical: str) -> int:
        """The number of parts into which the rules split a logical axis."""
        return parts_over(self.rules.mesh_axis(logical), axis_sizes(self.mesh))


_ACTIVE: contextvars.ContextVar[ActiveMesh | None] = contextvars.ContextVar(
    "gshard_tf_active_mesh", default=None
)


@contextlib.contextmanager
def use_mesh(mesh: dtensor.Mesh, rules: "AxisRules") -> Iterator[ActiveMesh]:
    """Makes annotations traced inside it real, for `mesh` and `rules`.

    Strategies enter it around the step that they trace; outside of it every
    annotation is the identity.
    """
    active = ActiveMesh(mesh, rules)
    token = _ACTIVE.set(active)
    try:
        yield active
    finally:
        _ACTIVE.reset(token)


def active_mesh() -> ActiveMesh | None:
    """The mesh that annotations apply to now, or None."""
    return _ACTIVE.get()


def without_mesh(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Returns `fn` with every annotation the identity, whatever mesh is active."""

    @functools.wraps(fn)
    def plain(*args: Any, **kwargs: Any) -> Any:
        token = _ACTIVE.set(None)
        try:
            return fn(*args, **kwargs)
        finally:
            _ACTIVE.reset(token)

    return plain
