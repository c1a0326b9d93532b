"""`tpu_strategy`: TensorFlow's own `TPUStrategy`, for a mesh."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import keras
import tensorflow as tf
from tensorflow.experimental import dtensor

from gshard_tf.compat import tpu as tpu_compat
from gshard_tf.compat.tf_graphs import is_compiled_by_tensorflow
from gshard_tf.compat.tf_saving import patch_trackable_restore
from gshard_tf.sharding import op_sharding
from gshard_tf.sharding.annotations import partitioning
from gshard_tf.sharding.initial_value import InitialValue
from gshard_tf.sharding.layout_map import as_rules
from gshard_tf.sharding.mesh import axis_sizes, create_mesh, use_mesh
from gshard_tf.sharding.rules import AxisRules
from gshard_tf.sharding.sharded_variable import MeshVariableBase
from gshard_tf.spmd.base import MeshStrategy
from gshard_tf.tpu.core_layouts import CoreLayouts
from gshard_tf.tpu.core_shards import Storage
from gshard_tf.tpu.core_variables import (
    MeshTPUSyncOnReadVariable,
    MeshTPUVariable,
    ReplicaVariable,
)
from gshard_tf.tpu.device_assignment import assign_cores
from gshard_tf.tpu.partitioner_faults import PartitionerFaults
from gshard_tf.tpu.system import connect


def tpu_strategy(
    tpu: str | tf.distribute.cluster_resolver.ClusterResolver | None = None,
    mesh: dtensor.Mesh | Mapping[str, int] | None = None,
    rules: AxisRules | None = None,
    topology: tf.tpu.experimental.Topology | None = None,
) -> "MeshTPUStrategy":
    """Returns a `tf.distribute.TPUStrategy` in SPMD mode that shards weights on a mesh.

    The same model code and the same `with strategy.scope():` as with `SpmdStrategy`.

    ```python
    strategy = gshard_tf.tpu_strategy("local", {"expert": 8})
    with strategy.scope():
        model = ...
        model.compile("adam", "mse")
    model.fit(dataset)
    ```

    Args:
        tpu: The TPU's name or address, as for `TPUClusterResolver`: `"local"` on a TPU
            VM. It is connected to and initialized, which clears its memory. Or a
            resolver of your own.
        mesh: The cores of *one replica*: axes and sizes, or a mesh. With fewer cores
            than the slice has, the rest are further replicas, which TPUStrategy
            trains data-parallel: `{"expert": 4}` on 8 cores makes 2 replicas, each
            with all the experts. None: one replica, `{"expert": all cores}`.
        rules: An `AxisRules`; defaults to the paper's layout,
            `AxisRules.default(mesh)`.
        topology: What `initialize_tpu_system` returned, if you have called it
            yourself; `tpu` is then the resolver that you called it with.

    Returns:
        The strategy.

    Raises:
        ImportError: when the versions installed do not work together on a TPU.
        ValueError: when the mesh does not fit the slice, or a rule does not fit the
            mesh.
    """
    resolver, topology = connect(tpu, topology)
    if mesh is None:
        mesh = {"expert": topology.num_tasks * topology.num_tpus_per_task}
    if not isinstance(mesh, dtensor.Mesh):
        mesh = create_mesh(mesh, "TPU")
    return MeshTPUStrategy(resolver, topology, mesh, rules)


class MeshTPUStrategy(MeshStrategy, tf.distribute.TPUStrategy):
    """The strategy that `tpu_strategy` returns.

    Args:
        resolver: The resolver of a TPU that is connected to and initialized.
        topology: Its topology.
        mesh: The cores of one replica.
        rules: The rules, or None.
    """

    extended: "MeshTPUExtended"
    unowned_hint = " (On a mesh of one core, all variables are TensorFlow's own.)"

    def __init__(
        self,
        resolver: tf.distribute.cluster_resolver.ClusterResolver,
        topology: tf.tpu.experimental.Topology,
        mesh: dtensor.Mesh,
        rules: AxisRules | None = None,
    ):
        # Not TPUStrategy's own constructor, which would create its own extended half.
        tf.distribute.Strategy.__init__(
            self, MeshTPUExtended(self, resolver, topology, mesh, rules)
        )
        # Packing makes one handle of those of all cores; shards need their own.
        tpu_compat.set_packed_variables(self, mesh.size == 1)

    @property
    def device_assignment(self) -> tf.tpu.experimental.DeviceAssignment:
        """The core of the slice at each position of the mesh, in each replica."""
        return self.extended.device_assignment


class MeshTPUExtended(tpu_compat.TPUExtended):
    """The extended half of the strategy, through which `tf.distribute` calls it."""

    def __init__(
        self,
        container: MeshTPUStrategy,
        resolver: tf.distribute.cluster_resolver.ClusterResolver,
        topology: tf.tpu.experimental.Topology,
        mesh: dtensor.Mesh,
        rules: AxisRules | None,
    ):
        rules = as_rules(rules, mesh)
        self.device_assignment = assign_cores(topology, mesh)
        super().__init__(
            container,
            resolver,
            device_assignment=self.device_assignment,
            use_spmd_for_xla_partitioning=mesh.size > 1,
        )
        self.mesh = mesh
        self.layouts = CoreLayouts(mesh, rules)
        self._faults = PartitionerFaults(axis_sizes(mesh))
        patch_trackable_restore()

    # -- variables -------------------------------------------------------------------

    def _create_variable(self, next_creator: Callable, **kwargs: Any) -> Any:
        reference = kwargs.get("colocate_with")
        if (
            self.mesh.size == 1
            or kwargs.get("skip_mirrored_creator")
            or kwargs.get("custom_tpu_variable_creator")
            or not isinstance(reference, MeshVariableBase | None)
        ):
            return super()._create_variable(next_creator, **kwargs)
        kwargs.pop("colocate_with", None)
        initial = InitialValue(
            kwargs.pop("initial_value"), kwargs.get("shape"), kwargs.get("dtype")
        )
        devices = tpu_compat.core_devices(self)
        storage = Storage(
            devices,
            self.layouts,
            initial,
            name=kwargs.get("name") or "Variable",
            trainable=kwargs.get("trainable") is not False,
        )
        variable = tpu_compat.create_distributed_variable(
            tpu_compat.strategy_of(self),
            lambda **_: [ReplicaVariable(storage, r) for r in range(len(devices))],
            MeshTPUVariable,
            MeshTPUSyncOnReadVariable,
            **kwargs,
        )
        storage.set_owner(variable)
        self.layouts.register(variable, reference)
        return variable

    def owns(self, value: Any) -> bool:
        """Returns whether it is a variable that this strategy stores on its mesh."""
        return isinstance(value, MeshTPUVariable | MeshTPUSyncOnReadVariable) and (
            value.distribute_strategy is tpu_compat.strategy_of(self)
        )

    # -- input -----------------------------------------------------------------------

    def _experimental_distribute_dataset(self, dataset: Any, options: Any) -> Any:
        return super()._experimental_distribute_dataset(dataset, self._input(options))

    def _distribute_datasets_from_function(
        self, dataset_fn: Callable, options: Any
    ) -> Any:
        return super()._distribute_datasets_from_function(
            dataset_fn, self._input(options)
        )

    def _input(self, options: Any) -> Any:
        # By itself TensorFlow would put the whole batch of a replica on its first
        # core. From the host, each core gets its shard.
        if options is None and self.mesh.size > 1:
            return tf.distribute.InputOptions(experimental_fetch_to_device=False)
        return options

    # -- steps -----------------------------------------------------------------------

    def tpu_run(self, fn: Callable, args: Any, kwargs: Any, options: Any = None) -> Any:
        if is_compiled_by_tensorflow(tf.compat.v1.get_default_graph()):
            raise ValueError(
                "A TPU program is compiled by the TPU, so strategy.run cannot be "
                "called in a function with jit_compile=True. Compile a Keras model "
                "with jit_compile='auto' (the default) or False. Received: "
                "jit_compile=True"
            )
        if self.mesh.size == 1:
            return super().tpu_run(fn, args, kwargs, options)
        with use_mesh(self.mesh, self.layouts.rules):
            step = self._with_sharded_inputs(fn)
            result = super().tpu_run(step, args, kwargs, options)
        self.layouts.warn_once()
        return result

    def _with_sharded_inputs(self, fn: Callable) -> Callable:
        """Returns `fn` with its arguments split by examples before anything uses them.

        A TPU's host then sends each core its shard of them, and no more. While `fn` is
        traced, operations that XLA may partition wrongly are warned of.
        """

        @functools.wraps(fn)
        def step(*args, **kwargs):
            args, kwargs = tf.nest.map_structure(self._split_examples, (args, kwargs))
            graph = tf.compat.v1.get_default_graph()
            before = len(graph.get_operations())
            result = fn(*args, **kwargs)
            self._faults.warn_once(graph.get_operations()[before:])
            return result

        return step

    def _split_examples(self, value: Any) -> Any:
        if not tf.is_tensor(value) or isinstance(value, tf.Variable | keras.Variable):
            return value
        if not isinstance(value, tf.Tensor) or not value.shape.is_fully_defined():
            return value
        if partitioning(value) is None:
            return value
        layout = self.layouts.batch_layout(value.shape)
        return op_sharding.constrain(value, op_sharding.from_layout(layout))
