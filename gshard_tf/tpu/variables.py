"""Variables of a TPUStrategy that are split over the cores of a replica.

In SPMD mode TensorFlow's own strategy keeps every variable in full on every core.
Here a core holds its part: `CoreShards` are the parts of one replica, which a TPU
program sees as one variable of the full shape, and `MeshTPUVariable` is what layers,
optimizers and users see.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf

# Private APIs: no public name makes a variable of parts that a TPU program takes for
# one. On an upgrade, compare `handle` below with that of `TPUReplicatedVariable`, and
# check that `TPUMirroredVariable` still reaches its values through `_values`.
from tensorflow.core.framework import attr_value_pb2
from tensorflow.experimental import dtensor
from tensorflow.python.distribute import (
    tpu_replicated_variable,
    tpu_util,
    tpu_values,
)
from tensorflow.python.ops import gen_resource_variable_ops
from tensorflow.python.ops import gen_tpu_partition_ops as partition_ops
from tensorflow.python.saved_model import save_context
from tensorflow.python.trackable import base as trackable

from gshard_tf.sharding import op_sharding
from gshard_tf.sharding.partition_spec import PartitionSpec, spec_of
from gshard_tf.sharding.regions import Region
from gshard_tf.sharding.sharded_variable import MeshVariableBase, ShardedVariable
from gshard_tf.testing.tpu.bridge import tile_assignment
from gshard_tf.tpu.exported_variable import being_exported
from gshard_tf.tpu.storage import Storage


class CoreShards(tpu_replicated_variable.TPUReplicatedVariable):
    """What the cores of one replica hold of a variable.

    Args:
        storage: The variable's storage.
        replica: Which replica.
    """

    def __init__(self, storage: Storage, replica: int):
        # Not TensorFlow's constructor: it wants the variables of all cores, of one
        # shape, now.
        self.storage = storage
        self._replica = replica
        self._name = f"{storage.name}/r:{replica}"
        self._common_name = self._name.split(":")[0]
        self._cached_value = None

    @property
    def _vars(self) -> list[Any]:
        return self.storage.cores(self._replica)

    # -- known before there are values --------------------------------------------

    @property
    def dtype(self) -> tf.DType:
        return self.storage.dtype

    @property
    def shape(self) -> tf.TensorShape:
        return self.storage.shape

    def get_shape(self) -> tf.TensorShape:
        return self.storage.shape

    @property
    def trainable(self) -> bool:
        return self.storage.trainable

    @property
    def constraint(self) -> None:
        return None

    @property
    def device(self) -> str:
        return self.storage.devices[self._replica][0]

    @property
    def _unique_id(self) -> str:
        return f"{self._common_name}_{id(self.storage)}"

    @property
    def _in_graph_mode(self) -> bool:
        return False

    # -- in a TPU program ------------------------------------------------------------

    @property
    def handle(self) -> tf.Tensor:
        if save_context.in_save_context() or tf.executing_eagerly():
            return self._vars[0].handle
        if tpu_util.enclosing_tpu_context() is None:
            raise NotImplementedError(
                f"The variable {self.name!r} is split over cores, so it has one handle "
                "only inside a TPU program. Outside, use read_value() and assign()."
            )
        storage, held = self.storage, self._vars
        dims, cores = [], range(len(held))
        if storage.is_split:
            dims, cores = tile_assignment(storage.sharding())
        with tpu_util.outside_or_skip_tpu_context():
            whole = partition_ops.tpu_partitioned_input_v2(
                # The runtime gives the i-th part to the core that the sharding names.
                [held[core].handle for core in cores],
                partition_dims=dims,
                is_packed=False,
            )
            sharding = attr_value_pb2.AttrValue(s=storage.sharding())
            whole.op._set_attr("_XlaSharding", sharding)
        return whole

    # -- outside of it ---------------------------------------------------------------

    def read_value(self) -> tf.Tensor:
        if not self.storage.is_split:
            return self._vars[0].read_value()
        if not tf.executing_eagerly() and being_exported():
            # By the raw operation: a variable that the graph knows of as read would be
            # saved besides this one.
            return gen_resource_variable_ops.read_variable_op(
                self.storage.exported_whole.handle, self.dtype
            )
        return self.storage.assemble([v.read_value() for v in self._vars])

    def _update(self, update_fn: Callable, value: Any, **kwargs: Any) -> Any:
        value = tf.convert_to_tensor(value, dtype=self.dtype)
        if not value.shape.is_compatible_with(self.shape):
            raise ValueError(
                f"The variable {self.name!r} has the shape {self.shape}. "
                f"Received: a value of shape {value.shape}"
            )
        updates = []
        for variable, tile in zip(self._vars, self.storage.tiles(), strict=True):
            slices = self.storage.slices(tile)
            with tf.device(variable.device):
                updates.append(
                    update_fn(variable, value[slices] if slices else value, **kwargs)
                )
        return None if tf.executing_eagerly() else tf.group(*updates)

    def _export_to_saved_model_graph(
        self, object_map: Any, tensor_map: Any, options: Any, **kwargs: Any
    ) -> list[Any]:
        arguments = {
            "object_map": object_map,
            "tensor_map": tensor_map,
            "options": options,
            **kwargs,
        }
        if not self.storage.is_split:
            return super()._export_to_saved_model_graph(**arguments)
        whole = self.storage.exported_whole
        resources = whole._export_to_saved_model_graph(**arguments)
        for part in self._vars:
            object_map[part] = object_map[whole]
            tensor_map[part.handle] = tensor_map[whole.handle]
            resources.append(part.handle)
        object_map[self] = object_map[whole]
        tensor_map[self] = tensor_map[whole.handle]
        return [*resources, self]


class _OnCores(MeshVariableBase):
    """What the variables of all kinds have in common. `_values`: one per replica."""

    _values: list[CoreShards]

    @property
    def storage(self) -> Storage:
        return self._values[0].storage

    @property
    def path(self) -> str:
        keras_variable = self.keras_variable and self.keras_variable()
        return self.storage.name if keras_variable is None else keras_variable.path

    @property
    def bytes_per_core(self) -> int:
        """Bytes that each core holds, those of the parts themselves."""
        [size] = {
            int(np.prod(v.shape)) * v.dtype.size
            for shards in self._values
            for v in shards._vars
        }
        return size

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        # Keras turns variables to arrays to save them. (TensorFlow's own in SPMD mode
        # have no such method outside the scope.)
        return np.array(self.numpy(), dtype=dtype, copy=copy)


class MeshTPUVariable(ShardedVariable, _OnCores, tpu_values.TPUMirroredVariable):
    """A weight, a slot or a counter: equal in all replicas, split within each."""

    lies_in_parts = True  # what `restoring.py` looks for

    def _read_variable_op(self) -> tf.Tensor:
        value = super()._read_variable_op()
        if self.decision is not None and self.decision.compute is not None:
            # Stored split to save memory, used as the rules say.
            value = op_sharding.constrain(
                value, op_sharding.from_layout(self.decision.compute)
            )
        return value

    # In a TPU program, TensorFlow's own way. Outside, each replica's parts.

    def assign(self, value: Any, *args: Any, **kwargs: Any) -> Any:
        if _in_tpu_program():
            return super().assign(value, *args, **kwargs)
        return self._update_replicas("assign", value)

    def assign_add(self, value: Any, *args: Any, **kwargs: Any) -> Any:
        if _in_tpu_program():
            return super().assign_add(value, *args, **kwargs)
        return self._update_replicas("assign_add", value)

    def assign_sub(self, value: Any, *args: Any, **kwargs: Any) -> Any:
        if _in_tpu_program():
            return super().assign_sub(value, *args, **kwargs)
        return self._update_replicas("assign_sub", value)

    def _update_replicas(self, method: str, value: Any) -> Any:
        updates = [getattr(shards, method)(value) for shards in self._values]
        if tf.executing_eagerly():
            return self
        with tf.control_dependencies(updates):
            return self.read_value()

    # -- sparse updates: rows of an embedding ------------------------------------------

    def scatter_add(
        self, sparse_delta: tf.IndexedSlices, use_locking: Any = False, name: Any = None
    ) -> Any:
        return self._scatter(
            gen_resource_variable_ops.resource_scatter_add,
            tf.tensor_scatter_nd_add,
            sparse_delta,
        )

    def scatter_sub(
        self, sparse_delta: tf.IndexedSlices, use_locking: Any = False, name: Any = None
    ) -> Any:
        return self._scatter(
            gen_resource_variable_ops.resource_scatter_sub,
            tf.tensor_scatter_nd_sub,
            sparse_delta,
        )

    def scatter_update(
        self, sparse_delta: tf.IndexedSlices, use_locking: Any = False, name: Any = None
    ) -> Any:
        return self._scatter(
            gen_resource_variable_ops.resource_scatter_update,
            tf.tensor_scatter_nd_update,
            sparse_delta,
        )

    def _scatter(self, raw: Callable, dense: Callable, delta: tf.IndexedSlices) -> Any:
        if _in_tpu_program():
            return tpu_util.make_raw_scatter_xxx_fn(raw)(self, sparse_delta=delta)
        rows = tf.convert_to_tensor(delta.indices)[:, None]
        return self.assign(dense(self.read_value(), rows, delta.values))

    # -- checkpoints of ours -----------------------------------------------------------

    @property
    def mesh(self) -> dtensor.Mesh:
        """The mesh of one replica."""
        return self.storage.layout.mesh

    def partition_spec(self) -> PartitionSpec:
        return spec_of(self.storage.layout)

    def addressable_shards(self) -> list[tuple[Region, tf.Tensor]]:
        held = self.storage.cores(0)  # of replicas that are all alike
        found = {}
        for variable, tile in zip(held, self.storage.tiles(), strict=True):
            if tile not in found:
                with tf.device("/cpu:0"):
                    found[tile] = tf.identity(variable.read_value())
        return [(self.storage.region(tile), part) for tile, part in found.items()]

    def stage(self, read: Callable[[Region], np.ndarray]) -> Callable[[], None]:
        tiles = self.storage.tiles()
        values = {
            tile: read(self.storage.region(tile)) for tile in dict.fromkeys(tiles)
        }

        def commit() -> None:
            for shards in self._values:
                for variable, tile in zip(shards._vars, tiles, strict=True):
                    with tf.device(variable.device):
                        variable.assign(values[tile], read_value=False)

        return commit

    # -- TensorFlow's checkpoints ------------------------------------------------------

    def _serialize_to_tensors(self) -> dict[str, Any]:
        """Each distinct part, read where it lies: nobody has the whole."""
        shards, storage = self._values[0], self.storage
        saved = {}
        for variable, tile in zip(shards._vars, storage.tiles(), strict=True):
            spec = _slice_spec(storage, tile)
            if spec not in saved:
                saved[spec] = variable._serialize_to_tensors()[
                    trackable.VARIABLE_VALUE_KEY
                ]
        return {trackable.VARIABLE_VALUE_KEY: saved}

    def _restore_from_tensors(self, restored_tensors: dict[str, Any]) -> Any:
        restored = restored_tensors[trackable.VARIABLE_VALUE_KEY]
        if not isinstance(restored, dict):
            restored = {"": restored}
        storage = self.storage
        updates = []
        for shards in self._values:
            for variable, tile in zip(shards._vars, storage.tiles(), strict=True):
                with tf.device(variable.device):
                    value = restored[_slice_spec(storage, tile)]
                    updates.append(variable.assign(value, read_value=False))
        return None if tf.executing_eagerly() else tf.group(*updates)


class MeshTPUSyncOnRead(_OnCores, tpu_values.TPUSyncOnReadVariable):
    """A metric's variable: each replica has its own, and reading sums them."""


def _in_tpu_program() -> bool:
    return not tf.executing_eagerly() and tpu_util.enclosing_tpu_context() is not None


def _slice_spec(storage: Storage, tile: tuple[int, ...]) -> str:
    """A part as checkpoints call it: `"8 32 0,1:0,32"` is row 0 of 8; "" the whole."""
    slices = storage.slices(tile)
    if not slices:
        return ""
    whole = " ".join(str(n) for n in storage.shape)
    parts = ":".join(f"{s.start},{s.stop - s.start}" for s in slices)
    return f"{whole} {parts}"
