"""Variables whose value lives on the mesh while training runs.

A `MeshVariable` is an ordinary TensorFlow resource variable with a second home: the
devices of a mesh. The two are kept coherent as caches are: one is fresh, or both
are, and whoever touches the stale one brings it up to date first. So a step finds
its state on the devices, and nobody (a callback, a checkpoint, `get_weights`, a
function of the user's own) ever sees an old value.
"""

import contextlib
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import numpy as np
import tensorflow as tf

# Private API: whether Keras is inferring shapes. On an upgrade, check that
# `compute_output_spec` of the TensorFlow backend still enters a `SymbolicScope`.
from keras.src.backend.common.symbolic_scope import in_symbolic_scope

# Private APIs: the class of `tf.Variable`'s instances, and its raw operations. All
# of its methods reach the resource through the property `handle`, and C++ through
# `_handle`; on an upgrade, check that this still holds and that reads still pass
# through `_read_variable_op` or `_handle`.
from tensorflow.python.eager import context
from tensorflow.python.ops import gen_resource_variable_ops, resource_variable_ops

from gshard_tf.compat.tensorflow import out_of_graphs
from gshard_tf.compat.tf_gradients import with_dense_gradient
from gshard_tf.runtime.device_arrays import addressable_shards
from gshard_tf.sharding.partition_spec import PartitionSpec, spec_of
from gshard_tf.sharding.regions import Region
from gshard_tf.sharding.sharded_variable import InPieces


class _Raw(threading.local):
    depth = 0


_RAW = _Raw()


@contextlib.contextmanager
def raw_handles() -> Iterator[None]:
    """Inside it, `handle` is the bare resource: for reads and for tracing a step."""
    _RAW.depth += 1
    try:
        yield
    finally:
        _RAW.depth -= 1


class Residence(Protocol):
    """Moves a variable's value between the host and the devices of a mesh."""

    lock: Any

    def to_host(self, device_value: Any) -> np.ndarray: ...

    def layout(self, variable: Any) -> tf.experimental.dtensor.Layout: ...

    def assemble(self, variable: Any, read: Callable[[Region], np.ndarray]) -> Any: ...


class MeshVariable(InPieces, resource_variable_ops.ResourceVariable):
    """A `tf.Variable` that a strategy keeps on its mesh."""

    residence: Residence | None = None
    _device_value: Any = None
    _host_is_fresh: bool = True
    _foreign_graphs: weakref.WeakSet | None = None
    _resource: tf.Tensor

    # -- the two homes ---------------------------------------------------------

    @property
    def handle(self) -> tf.Tensor:
        if self.residence is None or _RAW.depth:
            return self._resource
        with self.residence.lock:
            self._refresh_host()
            if in_symbolic_scope():
                # Keras infers shapes in a graph that never runs (and never dies).
                return self._resource
            # Whoever holds the handle may write, now or (from a graph) later.
            self._device_value = None
            if not context.executing_eagerly():
                self._note_foreign_graph()
        return self._resource

    def take_device_value(self, upload: Any) -> Any:
        """The value on the devices, brought there by `upload(array)` if need be."""
        if self._device_value is None or self._has_foreign_graphs():
            with raw_handles():
                # `.numpy()` copies, so nothing on a device aliases TensorFlow's
                # buffer.
                value = super().numpy()
            self._device_value = upload(value)
        self._check_not_lost()
        return self._device_value

    def _is_lost(self) -> bool:
        # A step that fails half-way has used up its donated arguments.
        return self._device_value is not None and self._device_value.is_deleted()

    def _check_not_lost(self) -> None:
        if self._is_lost():
            raise RuntimeError(
                f"The value of {self.name!r} was lost in a step that failed half-way. "
                "Assign the variables anew, from a checkpoint, say."
            )

    def set_device_value(self, value: Any) -> None:
        """What a step made of it; the host's copy is stale from now on."""
        self._device_value = value
        self._host_is_fresh = False
        if self._has_foreign_graphs():
            # A function of somebody else's reads the resource without asking us.
            self._refresh_host()

    @property
    def device_value(self) -> Any:
        """The value on the devices, or None if it is not there."""
        return self._device_value

    def own_pieces(self) -> list[tuple[Region, np.ndarray]] | None:
        if self._device_value is None:
            return None
        self._check_not_lost()
        return list(addressable_shards(self._device_value))

    def pieces_held(self) -> contextlib.AbstractContextManager:
        return self.residence.lock

    def load(self, read: Callable[[Region], np.ndarray]) -> Callable[[], None]:
        # Nothing of it passes through the host's copy, which is stale from then on.
        value = self.residence.assemble(self, read)

        def become() -> None:
            with self.residence.lock:
                self.set_device_value(value)

        return become

    def partition_spec(self) -> PartitionSpec:
        return spec_of(self.residence.layout(self))

    @property
    def mesh(self) -> tf.experimental.dtensor.Mesh:
        """The mesh that it lives on."""
        return self.residence.mesh

    def _refresh_host(self) -> None:
        if not self._host_is_fresh:
            self._check_not_lost()
            value = self.residence.to_host(self._device_value)
            # A reader may be building a graph of any kind: a function's, or the plain
            # one of a SavedModel.
            with out_of_graphs():
                gen_resource_variable_ops.assign_variable_op(
                    self._resource, tf.constant(value, dtype=self._dtype)
                )
            self._host_is_fresh = True

    def _note_foreign_graph(self) -> None:
        if self._foreign_graphs is None:
            self._foreign_graphs = weakref.WeakSet()
        graph = tf.compat.v1.get_default_graph()
        # The graph of a `tf.cond` branch dies once it is built; its outer graph lives
        # for as long as the function that can run it.
        while graph is not None:
            self._foreign_graphs.add(graph)
            graph = getattr(graph, "outer_graph", None)
            if graph is None or not graph.building_function:
                break

    def _has_foreign_graphs(self) -> bool:
        return bool(self._foreign_graphs)

    # -- reading does not make the devices' copy stale ---------------------------

    @property
    def _handle(self) -> tf.Tensor:
        # TensorFlow's eager operations read a variable that is their input from C++,
        # by way of this attribute and no method.
        if self.residence is not None and not _RAW.depth:
            if context.executing_eagerly():
                with self.residence.lock:
                    self._refresh_host()
        return self._resource

    @_handle.setter
    def _handle(self, handle: tf.Tensor) -> None:
        self._resource = handle
        # A step may use a handle alone, as Keras 2's legacy optimizers do.
        handle._gshard_variable = weakref.ref(self)

    def _read_variable_op(self, no_copy: bool = False) -> tf.Tensor:
        if self._is_read_by_step():
            return with_dense_gradient(
                lambda: super(MeshVariable, self)._read_variable_op(no_copy),
                "ReadVariableOp",
                self.handle,
            )
        if self.residence is None or _RAW.depth or not context.executing_eagerly():
            return super()._read_variable_op(no_copy)
        with self.residence.lock:
            self._refresh_host()
            with raw_handles():
                return super()._read_variable_op(no_copy)

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
            self.residence is not None
            and _RAW.depth > 0
            and not context.executing_eagerly()
        )

    # -- a new value needs no old one ----------------------------------------------

    def assign(self, value: Any, *args: Any, **kwargs: Any) -> Any:
        self._give_up_lost()
        return super().assign(value, *args, **kwargs)

    def _restore_from_tensors(self, restored_tensors: dict[str, Any]) -> Any:
        self._give_up_lost()
        return super()._restore_from_tensors(restored_tensors)

    def _give_up_lost(self) -> None:
        if self._is_lost() and context.executing_eagerly():
            self._device_value = None
            self._host_is_fresh = True

    @property
    def device(self) -> str:
        return self._resource.device

    def is_initialized(self, name: str | None = None) -> tf.Tensor:
        with raw_handles():
            return super().is_initialized(name)


def variable_of(handle: tf.Tensor) -> MeshVariable | None:
    """The variable that a handle is of, if it is one of a mesh."""
    found = getattr(handle, "_gshard_variable", None)
    return None if found is None else found()
