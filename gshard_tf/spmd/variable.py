"""Variables whose value stays on the mesh while training runs.

A `MeshVariable` is an ordinary TensorFlow resource variable, the host copy, with a
second copy on the devices of a mesh. The two are kept coherent as caches are: one is
current, or both are, and every reader or writer of a stale one updates it first. So a
step finds its state on the devices, and no reader (a callback, a checkpoint,
`get_weights`, a function of the user's own) ever sees an old value.

A large one has a host copy only while somebody holds it: its resource keeps shape and
dtype, and the memory is freed once the devices have the value. It begins as an
`InitialValue`, which the devices get shard by shard.
"""

import contextlib
import threading
import weakref
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import tensorflow as tf

from gshard_tf.compat.keras_models import in_symbolic_scope
from gshard_tf.compat.keras_variables import in_layer_scope
from gshard_tf.compat.tensorflow import out_of_graphs
from gshard_tf.compat.tf_gradients import with_dense_gradient
from gshard_tf.compat.tf_variables import OwnContainer, ResourceVariable
from gshard_tf.layouts.partition_spec import PartitionSpec
from gshard_tf.runtime.device_arrays import (
    Placement,
    addressable_shards,
    assemble,
    named_sharding,
)
from gshard_tf.runtime.process_group import group
from gshard_tf.sharding.initial_value import InitialValue
from gshard_tf.sharding.mesh_layout import MeshLayout
from gshard_tf.sharding.regions import Region, cut
from gshard_tf.sharding.sharded_variable import ShardedMeshVariable
from gshard_tf.sharding.variable_layouts import VariableLayouts
from gshard_tf.spmd import resources

# Of an initial value, the elements that processes compare.
_CHECKED_ELEMENTS = 1 << 16


class _Raw(threading.local):
    depth = 0


_RAW = _Raw()


@contextlib.contextmanager
def raw_handles() -> Iterator[None]:
    """Makes `handle` the bare resource: for reads and for tracing a step."""
    _RAW.depth += 1
    try:
        yield
    finally:
        _RAW.depth -= 1


class VariableTransfer:
    """Moves values of variables between the host and the devices, one user at a time.

    Args:
        placement: The devices.
        layouts: The layouts of the variables.

    Attributes:
        lock: Held by the user of the variables: a step, or a reader.
        mesh: The mesh of the devices.
    """

    def __init__(self, placement: Placement, layouts: VariableLayouts):
        self.lock = threading.RLock()
        self.mesh = placement.mesh
        self.to_host = placement.get
        self._placement = placement
        self._layouts = layouts

    def layout(self, variable: "MeshVariable") -> MeshLayout:
        """The layout in which a variable is stored."""
        return self._layouts.layout_for(variable).storage

    def assemble(
        self, variable: "MeshVariable", read: Callable[[Region], np.ndarray]
    ) -> Any:
        """A device copy of a variable, whose regions come from `read`."""
        sharding = named_sharding(self.layout(variable), self._placement.jax_mesh)
        return assemble(tuple(variable.shape), sharding, read)


class MeshVariable(ShardedMeshVariable, OwnContainer, ResourceVariable):
    """A `tf.Variable` that a strategy keeps on its mesh."""

    # The strategy sets it once the variable is created.
    transfer: VariableTransfer = None  # type: ignore[assignment]  # until then
    # Too large to keep a host copy.
    is_large: bool = False
    _device_copy: Any = None
    _host_is_current: bool = True
    # Whether the resource has the memory of a value.
    has_host_copy: bool = True
    # The value, until it is on the devices or another one is assigned.
    _initial: InitialValue | None = None
    # Of a value that was assigned in all processes, and no step has changed.
    _checksum: int | None = None
    _reader_graphs: weakref.WeakSet | None = None
    _resource: tf.Tensor

    # -- host copy and device copy ---------------------------------------------

    @property
    def handle(self) -> tf.Tensor:
        if self.transfer is None or _RAW.depth:
            return self._resource
        if in_symbolic_scope() and not tf.executing_eagerly():
            # Keras infers shapes in a graph that never runs (and never dies).
            return self._resource
        with self.transfer.lock:
            self._sync_host()
            # The holder of the handle may write, now or (from a graph) later.
            self._device_copy = self._initial = None
            self.has_host_copy = True
            if not tf.executing_eagerly():
                self._register_reader_graph()
        return self._resource

    def device_value(self, upload: Any) -> Any:
        """The value on the devices, which `upload(array)` copies there if need be."""
        if self._initial is not None:
            self._make_initial(self._initial)
        elif self._device_copy is None or self._has_reader_graphs():
            with raw_handles():
                # `.numpy()` copies, so nothing on a device aliases TensorFlow's
                # buffer.
                value = super().numpy()
            self._device_copy = upload(value)
        self._check_not_lost()
        self._free_host_copy()
        return self._device_copy

    def _is_lost(self) -> bool:
        # A step that fails half-way has used up its donated arguments.
        return self._device_copy is not None and self._device_copy.is_deleted()

    def _check_not_lost(self) -> None:
        if self._is_lost():
            raise RuntimeError(
                f"The value of {self.name!r} was lost in a step that failed half-way. "
                "It must be assigned anew, from a checkpoint, say. Received: a read of "
                "the lost value"
            )

    def set_device_copy(self, value: Any) -> None:
        """Replaces the device copy by a step's result; the host copy is stale then."""
        self._device_copy = value
        self._initial = self._checksum = None
        self._host_is_current = False
        if self._has_reader_graphs():
            # A function of the user's reads the resource directly.
            self._sync_host()
        self._free_host_copy()

    def discard_device_copy(self) -> None:
        """Makes the value count as lost: the step that was to make it has failed."""
        if self._device_copy is not None:
            self._device_copy.delete()

    @property
    def device_copy(self) -> Any:
        """The value on the devices, or None if only the host has it."""
        return self._device_copy

    def addressable_shards(self) -> list[tuple[Region, np.ndarray]] | None:
        if self._initial is not None:
            self._make_initial(self._initial)
        if self._device_copy is None:
            return None
        self._check_not_lost()
        return list(addressable_shards(self._device_copy))

    def hold_shards(self) -> contextlib.AbstractContextManager:
        return self.transfer.lock

    def stage(self, read: Callable[[Region], np.ndarray]) -> Callable[[], None]:
        # Nothing of it passes through the host copy, which is stale from then on.
        value = self.transfer.assemble(self, read)

        def commit() -> None:
            with self.transfer.lock:
                self.set_device_copy(value)

        return commit

    def partition_spec(self) -> PartitionSpec:
        return self.transfer.layout(self).spec

    @property
    def mesh(self) -> tf.experimental.dtensor.Mesh:
        """The mesh of the device copy."""
        return self.transfer.mesh

    def _sync_host(self) -> None:
        if not self._host_is_current:
            self._check_not_lost()
            # A reader may be building a graph of any kind: a function's, or the plain
            # one of a SavedModel.
            with out_of_graphs():
                if self._initial is not None:
                    value = self._initial.whole()
                else:
                    value = self.transfer.to_host(self._device_copy)
                    value = tf.constant(value, dtype=self._dtype)
            resources.write(self._resource, value)
            self._host_is_current = self.has_host_copy = True

    # -- without a host copy -----------------------------------------------------

    @property
    def _keeps_host_copy(self) -> bool:
        return not self.is_large or self._has_reader_graphs()

    def _free_host_copy(self) -> None:
        """Frees the memory of a host copy that is too large to be kept."""
        if not self.has_host_copy or self._keeps_host_copy:
            return
        if self._device_copy is not None or self._initial is not None:
            resources.free(self._resource, self._dtype)
            self.has_host_copy = self._host_is_current = False

    @contextlib.contextmanager
    def with_host_shape(self) -> Iterator[None]:
        """Context in which the resource has a shape: zeros, which nobody is to read."""
        if self.has_host_copy:
            yield
            return
        resources.write(self._resource, resources.untouched(self._shape, self._dtype))
        try:
            yield
        finally:
            resources.free(self._resource, self._dtype)

    def begin_as(self, initial: InitialValue) -> None:
        """Takes a first value in place of that of the resource."""
        self._initial = initial
        self._host_is_current = False
        self._free_host_copy()

    def _make_initial(self, initial: InitialValue) -> None:
        self._device_copy = self.transfer.assemble(self, initial.reader())
        self._initial = None

    def checksum(self) -> int | None:
        """A checksum of the value, where every process is to have made the same.

        None where a step or a checkpoint made it. An initial value is represented by
        its first elements.
        """
        if self._initial is not None:
            return checksum_of(self._initial.first(_CHECKED_ELEMENTS).numpy())
        if self._device_copy is None:
            return checksum_of(self.numpy())
        return self._checksum

    def _register_reader_graph(self) -> None:
        if self._reader_graphs is None:
            self._reader_graphs = weakref.WeakSet()
        graph = tf.compat.v1.get_default_graph()
        # The graph of a `tf.cond` branch dies once it is built; its outer graph lives
        # for as long as the function that can run it.
        while graph is not None:
            self._reader_graphs.add(graph)
            graph = getattr(graph, "outer_graph", None)
            if graph is None or not graph.building_function:
                break

    def _has_reader_graphs(self) -> bool:
        return bool(self._reader_graphs)

    # -- reading does not make the device copy stale ---------------------------

    @property
    def _handle(self) -> tf.Tensor:
        # TensorFlow's eager operations read a variable that is their input from C++,
        # by way of this attribute and no method.
        if self.transfer is not None and not _RAW.depth:
            if tf.executing_eagerly():
                with self.transfer.lock:
                    self._sync_host()
        return self._resource

    @_handle.setter
    def _handle(self, handle: tf.Tensor) -> None:
        self._resource = handle
        # A step may use a handle alone, as Keras 2's legacy optimizers do.
        handle.gshard_variable = weakref.ref(self)

    def _read_variable_op(self, no_copy: bool = False) -> tf.Tensor:
        if self._is_read_by_step():
            return with_dense_gradient(
                lambda: super(MeshVariable, self)._read_variable_op(no_copy),
                "ReadVariableOp",
                self.handle,
            )
        if self.transfer is None or _RAW.depth or not tf.executing_eagerly():
            return super()._read_variable_op(no_copy)
        with self.transfer.lock:
            self._sync_host()
            with raw_handles():
                value = super()._read_variable_op(no_copy)
            self._free_host_copy()
            return value

    def numpy(self) -> np.ndarray:
        if self.is_large and not _RAW.depth and tf.executing_eagerly():
            with self.transfer.lock:
                if not self._host_is_current and self._device_copy is not None:
                    # Past TensorFlow, whose allocator keeps the memory.
                    self._check_not_lost()
                    return self.transfer.to_host(self._device_copy)
        return super().numpy()

    # -- a step looks rows up in the value, whose gradient is dense -----------------

    def sparse_read(self, indices: Any, name: str | None = None) -> tf.Tensor:
        if self._is_read_by_step():
            return tf.gather(self._read_variable_op(), indices, name=name)
        return super().sparse_read(indices, name)

    def gather_nd(self, indices: Any, name: str | None = None) -> tf.Tensor:
        if self._is_read_by_step():
            return tf.gather_nd(self._read_variable_op(), indices, name=name)
        return super().gather_nd(indices, name)

    def _is_read_by_step(self) -> bool:
        return (
            self.transfer is not None and _RAW.depth > 0 and not tf.executing_eagerly()
        )

    # -- a new value needs no old one ----------------------------------------------

    def assign(self, value: Any, *args: Any, **kwargs: Any) -> Any:
        if self._is_assigned_in_shards():
            with self.transfer.lock:
                self._assign_shards(value)
            return self
        self._discard_lost()
        return super().assign(value, *args, **kwargs)

    def _is_assigned_in_shards(self) -> bool:
        return (
            self.transfer is not None
            and not _RAW.depth
            and tf.executing_eagerly()
            and not self._keeps_host_copy
            # A layer that is being built has yet to name the axes of its weights.
            and (self.decision is not None or not in_layer_scope())
        )

    def _assign_shards(self, value: Any) -> None:
        tensor = tf.convert_to_tensor(value, dtype=self._dtype)
        if not self._shape.is_compatible_with(tensor.shape):
            raise ValueError(
                f"A value of {self.name!r} must have the shape {self._shape}. "
                f"Received: a value of shape {tensor.shape}"
            )
        array = np.asarray(tensor)
        self.stage(lambda region: cut(array, region))()
        self._checksum = checksum_of(array) if group().count > 1 else None

    def _restore_from_tensors(self, restored_tensors: dict[str, Any]) -> Any:
        self._discard_lost()
        return super()._restore_from_tensors(restored_tensors)

    def _discard_lost(self) -> None:
        if self._is_lost() and tf.executing_eagerly():
            self._device_copy = None
            self._host_is_current = True

    @property
    def device(self) -> str:
        return self._resource.device

    def is_initialized(self, name: str | None = None) -> tf.Tensor:
        with raw_handles():
            return super().is_initialized(name)


def variable_of(handle: tf.Tensor) -> MeshVariable | None:
    """Returns the `MeshVariable` that a handle belongs to, or None."""
    reference = getattr(handle, "gshard_variable", None)
    return None if reference is None else reference()


@contextlib.contextmanager
def with_host_shapes(values: Iterable[Any]) -> Iterator[None]:
    """`MeshVariable.with_host_shape` of all the variables among `values`."""
    large = [v for v in values if isinstance(v, MeshVariable) and v.is_large]
    with contextlib.ExitStack() as stack:
        for transfer in {variable.transfer for variable in large}:
            stack.enter_context(transfer.lock)  # nobody reads meanwhile
        for variable in large:
            stack.enter_context(variable.with_host_shape())
        yield


def checksum_of(value: np.ndarray) -> int:
    """A checksum of an array's bytes."""
    data = np.ascontiguousarray(value).reshape(-1).view(np.uint8)
    return zlib.crc32(data.data)
