"""Variables of a TPUStrategy that are sharded over the cores of a replica.

In SPMD mode TensorFlow's own strategy keeps every variable in full on every core. Here
a core holds a shard: a `ReplicaVariable` is the shards of one replica, which a TPU
program sees as one variable of the full shape, and `MeshTPUVariable` is what layers,
optimizers and users see.
"""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import tensorflow as tf
from tensorflow.experimental import dtensor

from gshard_tf.checkpoints.tensor_bundle import slice_spec
from gshard_tf.compat import tf_saving, tpu
from gshard_tf.compat.keras_export import is_exporting
from gshard_tf.layouts.partition_spec import PartitionSpec
from gshard_tf.sharding import op_sharding
from gshard_tf.sharding.regions import Region
from gshard_tf.sharding.sharded_variable import MeshVariableBase, ShardedMeshVariable
from gshard_tf.tpu.core_shards import Coordinates, Storage

_DENSE_SCATTERS = {
    "add": tf.tensor_scatter_nd_add,
    "sub": tf.tensor_scatter_nd_sub,
    "update": tf.tensor_scatter_nd_update,
}


class ReplicaVariable(tpu.TPUReplicatedVariable):
    """The shards of a variable on the cores of one replica.

    Args:
        storage: The variable's storage.
        replica: The number of the replica.
    """

    def __init__(self, storage: Storage, replica: int):
        # Not TensorFlow's constructor, which needs the variables of all cores, of one
        # shape, now.
        self.storage = storage
        self._replica = replica
        self._name = f"{storage.name}/r:{replica}"
        self._common_name = self._name.split(":")[0]
        self._cached_value = None

    @property
    def core_variables(self) -> list[Any]:
        """The variable of each core, in the order of the mesh."""
        return self.storage.core_variables(self._replica)

    @property
    def _vars(self) -> list[Any]:  # as TensorFlow's class calls them
        return self.core_variables

    def shards(self) -> Iterator[tuple[Coordinates, Any]]:
        """Yields the coordinates of each core's shard, and the core's variable."""
        yield from zip(
            self.storage.shard_coordinates(), self.core_variables, strict=True
        )

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
        if tf_saving.in_save_context() or tf.executing_eagerly():
            return self.core_variables[0].handle
        if not tpu.in_tpu_program():
            raise NotImplementedError(
                "A variable that is sharded over cores must be in a TPU program to "
                "have one handle. Elsewhere, use read_value() and assign(). Received: "
                f"the variable {self.name!r}"
            )
        variables, sharding = self.core_variables, self.storage.op_sharding()
        dims: list[int] = []
        cores = list(range(len(variables)))
        if self.storage.is_sharded:
            assignment = op_sharding.tile_assignment(sharding)
            dims, cores = list(assignment.shape), assignment.ravel().tolist()
        handles = [variables[core].handle for core in cores]
        return tpu.partitioned_input(handles, dims, sharding)

    # -- outside of it ---------------------------------------------------------------

    def read_value(self) -> tf.Tensor:
        if not self.storage.is_sharded:
            return self.core_variables[0].read_value()
        if not tf.executing_eagerly() and is_exporting():
            # By the raw operation: a variable that the graph records as read would be
            # saved in addition to this one.
            return tf.raw_ops.ReadVariableOp(
                resource=self.storage.exported_whole.handle, dtype=self.dtype
            )
        return self.storage.assemble([v.read_value() for v in self.core_variables])

    def _update(self, update_fn: Callable, value: Any, **kwargs: Any) -> Any:
        value = tf.convert_to_tensor(value, dtype=self.dtype)
        if not value.shape.is_compatible_with(self.shape):
            raise ValueError(
                f"The value of {self.name!r} must have the shape {self.shape}. "
                f"Received: a value of shape {value.shape}"
            )
        updates = []
        for coordinates, variable in self.shards():
            index = self.storage.shard_index(coordinates)
            with tf.device(variable.device):
                updates.append(
                    update_fn(variable, value[index] if index else value, **kwargs)
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
        if not self.storage.is_sharded:
            return super()._export_to_saved_model_graph(**arguments)
        whole = self.storage.exported_whole
        resources = tf_saving.add_to_saved_model(whole, **arguments)
        for variable in self.core_variables:
            object_map[variable] = object_map[whole]
            tensor_map[variable.handle] = tensor_map[whole.handle]
            resources.append(variable.handle)
        object_map[self] = object_map[whole]
        tensor_map[self] = tensor_map[whole.handle]
        return [*resources, self]


class _StoredVariable(MeshVariableBase):
    """Base of both kinds of variables. `_values`: one per replica."""

    _values: list[ReplicaVariable]
    numpy: Callable[[], np.ndarray]

    @property
    def storage(self) -> Storage:
        return self._values[0].storage

    @property
    def path(self) -> str:
        keras_variable = None if self.keras_variable is None else self.keras_variable()
        return self.storage.name if keras_variable is None else keras_variable.path

    @property
    def bytes_per_core(self) -> int:
        """Bytes that each core holds: of the shards themselves."""
        [size] = {
            int(np.prod(variable.shape)) * variable.dtype.size
            for replica in self._values
            for variable in replica.core_variables
        }
        return size

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        # Keras turns variables to arrays to save them. (TensorFlow's own in SPMD mode
        # have no such method outside the scope.)
        return np.array(self.numpy(), dtype=dtype, copy=copy)


class MeshTPUVariable(ShardedMeshVariable, _StoredVariable, tpu.TPUMirroredVariable):
    """A weight, a slot or a counter: equal in all replicas, sharded within each."""

    is_sharded = True  # read by `tf_saving.patch_trackable_restore`

    def _read_variable_op(self) -> tf.Tensor:
        value = super()._read_variable_op()
        if self.decision is not None and self.decision.compute is not None:
            # Stored in more shards to save memory, used as the rules say.
            value = op_sharding.constrain(
                value, op_sharding.from_layout(self.decision.compute)
            )
        return value

    # In a TPU program, TensorFlow's own way. Outside, each replica's shards.

    def assign(self, value: Any, *args: Any, **kwargs: Any) -> Any:
        if tpu.in_tpu_program():
            return super().assign(value, *args, **kwargs)
        return self._update_replicas("assign", value)

    def assign_add(self, value: Any, *args: Any, **kwargs: Any) -> Any:
        if tpu.in_tpu_program():
            return super().assign_add(value, *args, **kwargs)
        return self._update_replicas("assign_add", value)

    def assign_sub(self, value: Any, *args: Any, **kwargs: Any) -> Any:
        if tpu.in_tpu_program():
            return super().assign_sub(value, *args, **kwargs)
        return self._update_replicas("assign_sub", value)

    def _update_replicas(self, method: str, value: Any) -> Any:
        updates = [getattr(replica, method)(value) for replica in self._values]
        if tf.executing_eagerly():
            return self
        with tf.control_dependencies(updates):
            return self.read_value()

    # -- sparse updates: rows of an embedding ------------------------------------------

    def scatter_add(
        self, sparse_delta: tf.IndexedSlices, use_locking: Any = False, name: Any = None
    ) -> Any:
        return self._scatter("add", sparse_delta)

    def scatter_sub(
        self, sparse_delta: tf.IndexedSlices, use_locking: Any = False, name: Any = None
    ) -> Any:
        return self._scatter("sub", sparse_delta)

    def scatter_update(
        self, sparse_delta: tf.IndexedSlices, use_locking: Any = False, name: Any = None
    ) -> Any:
        return self._scatter("update", sparse_delta)

    def _scatter(self, kind: str, delta: tf.IndexedSlices) -> Any:
        if tpu.in_tpu_program():
            return tpu.scatter_in_program(kind, self, delta)
        rows = tf.convert_to_tensor(delta.indices)[:, None]
        scatter = _DENSE_SCATTERS[kind]
        return self.assign(scatter(self.read_value(), rows, delta.values))

    # -- checkpoints of gshard_tf ------------------------------------------------------

    @property
    def mesh(self) -> dtensor.Mesh:
        """The mesh of one replica."""
        return self.storage.layout.mesh

    def partition_spec(self) -> PartitionSpec:
        return self.storage.layout.spec

    def addressable_shards(self) -> list[tuple[Region, tf.Tensor]]:
        shards = {}
        for coordinates, variable in self._values[0].shards():  # replicas are equal
            if coordinates not in shards:
                with tf.device("/cpu:0"):
                    shards[coordinates] = tf.identity(variable.read_value())
        return [
            (self.storage.shard_region(coordinates), value)
            for coordinates, value in shards.items()
        ]

    def stage(self, read: Callable[[Region], np.ndarray]) -> Callable[[], None]:
        values = {
            coordinates: read(self.storage.shard_region(coordinates))
            for coordinates in dict.fromkeys(self.storage.shard_coordinates())
        }

        def commit() -> None:
            for replica in self._values:
                for coordinates, variable in replica.shards():
                    with tf.device(variable.device):
                        variable.assign(values[coordinates], read_value=False)

        return commit

    # -- TensorFlow's checkpoints ------------------------------------------------------

    def _serialize_to_tensors(self) -> dict[str, Any]:
        """Each distinct shard, read on its own core: no host has the whole."""
        slices = {}
        for coordinates, variable in self._values[0].shards():
            spec = self._slice_spec(coordinates)
            if spec not in slices:
                slices[spec] = tf_saving.value_to_save(variable)
        return tf_saving.serialized_slices(slices)

    def _restore_from_tensors(self, restored_tensors: dict[str, Any]) -> Any:
        slices = tf_saving.restored_slices(restored_tensors)
        updates = []
        for replica in self._values:
            for coordinates, variable in replica.shards():
                with tf.device(variable.device):
                    value = slices[self._slice_spec(coordinates)]
                    updates.append(variable.assign(value, read_value=False))
        return None if tf.executing_eagerly() else tf.group(*updates)

    def _slice_spec(self, coordinates: Coordinates) -> str:
        region = self.storage.shard_region(coordinates)
        return slice_spec(tuple(self.storage.shape), region)


class MeshTPUSyncOnReadVariable(_StoredVariable, tpu.TPUSyncOnReadVariable):
    """A metric's variable: each replica has its own, and reading sums them."""
