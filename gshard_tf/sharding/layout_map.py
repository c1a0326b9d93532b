"""Keras's own `DeviceMesh` and `LayoutMap`, as a mesh and its rules."""

import re
from collections.abc import Sequence

import keras
from tensorflow.experimental import dtensor

from gshard_tf.sharding.mesh import DEVICE_TYPES, axis_sizes, create_mesh
from gshard_tf.sharding.rules import AxisRules


class LayoutMapRules(AxisRules):
    """The path rules of a `keras.distribution.LayoutMap`.

    The map itself finds the layout of a path, so that its regular expressions mean what
    they mean under `keras.distribution.ModelParallel`. The axes of its layouts are
    those of the mesh. A layout of fewer axes than a weight has dimensions leaves the
    last ones whole, as on jax.

    Args:
        layout_map: The map, with a `DeviceMesh`.
        batch_dim_name: The mesh axis over which batches are split, as in
            `ModelParallel`. Defaults to the first.

    Raises:
        ValueError: when the map has no mesh, when `batch_dim_name` is no axis of it, or
            when another axis is called `"batch"`.
    """

    is_layout_map = True

    def __init__(
        self,
        layout_map: keras.distribution.LayoutMap,
        batch_dim_name: str | None = None,
    ):
        if layout_map.device_mesh is None:
            raise ValueError(
                "`layout_map` must have a device mesh: LayoutMap(device_mesh). "
                "Received: a LayoutMap with device_mesh=None"
            )
        axes = tuple(layout_map.device_mesh.axis_names)
        batch = axes[0] if batch_dim_name is None else batch_dim_name
        if batch not in axes or ("batch" in axes and batch != "batch"):
            raise ValueError(
                "`batch_dim_name` must be an axis of the mesh, and 'batch' if one is "
                f"called so. Received: batch_dim_name={batch!r}, axes {axes}"
            )
        super().__init__(
            {"group": batch} | {axis: axis for axis in axes} | {"batch": batch},
            [(pattern, layout.axes) for pattern, layout in layout_map.items()],
        )
        self.layout_map = layout_map
        # Nobody wrote them, so none can be forgotten.
        self._is_default = True

    def check(self, mesh: dtensor.Mesh) -> None:
        super().check(mesh)
        own = self.layout_map.device_mesh
        sizes = dict(zip(own.axis_names, own.shape, strict=True))
        if sizes != axis_sizes(mesh):
            raise ValueError(
                "The mesh must be that of the layout map. Received: a mesh "
                f"{axis_sizes(mesh)}, and a map of {sizes}"
            )

    def path_axes(
        self, path: str, rank: int | None = None
    ) -> tuple[str, tuple[str | None, ...]] | None:
        layout = self.layout_map[path]
        if layout is None:
            return None
        patterns = [key for key, other in self.layout_map.items() if other is layout]
        if path not in patterns:
            patterns = [key for key in patterns if re.search(key, path)]
        axes = tuple(layout.axes)
        missing = 0 if rank is None else rank - len(axes)
        return (path if path in patterns else patterns[0]), axes + (None,) * missing


def as_rules(rules: object, mesh: dtensor.Mesh) -> AxisRules:
    """Returns the rules of what a strategy was given.

    Args:
        rules: An `AxisRules`, a `keras.distribution.LayoutMap`, or None for the paper's
            layout.
        mesh: The mesh of the strategy.

    Raises:
        ValueError: when it is something else, or does not fit the mesh.
    """
    if rules is None:
        return AxisRules.default(mesh)
    if isinstance(rules, keras.distribution.LayoutMap):
        rules = LayoutMapRules(rules)
    if not isinstance(rules, AxisRules):
        raise ValueError(
            "`rules` must be an AxisRules or a keras.distribution.LayoutMap. "
            f"Received: rules={rules!r}"
        )
    rules.check(mesh)
    return rules


def as_mesh(mesh: object) -> dtensor.Mesh:
    """Returns the mesh of what a strategy was given.

    Args:
        mesh: A mesh, or a `keras.distribution.DeviceMesh`. The names of its devices,
            `"cpu:0"` and so on, say of which type they are.

    Raises:
        ValueError: when it is something else, or the devices of a `DeviceMesh` are not
            those of one type, from 0, in their order.
    """
    if isinstance(mesh, keras.distribution.DeviceMesh):
        devices = [str(device).lower() for device in mesh.devices.flat]
        return create_mesh(
            list(zip(mesh.axis_names, map(int, mesh.shape), strict=True)),
            _type_of(devices),
        )
    if not isinstance(mesh, dtensor.Mesh):
        raise ValueError(
            "`mesh` must be a tf.experimental.dtensor.Mesh, as gshard_tf.create_mesh "
            "makes one, or a keras.distribution.DeviceMesh. Received: "
            f"mesh={mesh!r}"
        )
    return mesh


def _type_of(devices: Sequence[str]) -> str:
    kind = devices[0].partition(":")[0]
    in_order = [f"{kind}:{i}" for i in range(len(devices))]
    if kind.upper() not in DEVICE_TYPES or list(devices) != in_order:
        raise ValueError(
            "The devices of a DeviceMesh must be of one type, from 0, in their order: "
            "DeviceMesh(shape, axis_names, devices=[f'cpu:{i}' for i in range(8)]). "
            f"Received: devices={list(devices)}"
        )
    return kind
