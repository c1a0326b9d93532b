"""`tpu_strategy`: TensorFlow's own TPUStrategy, for a mesh."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import keras
import tensorflow as tf
from tensorflow.experimental import dtensor

# Private APIs: the extended half of TPUStrategy, whose variables are to be ours, and
# how it makes them. On an upgrade, compare `MeshTPUExtended` with `TPUExtended`:
# `_create_variable` (in SPMD mode), `tpu_run` and `_tpu_devices`; and
# `MeshTPUStrategy.__init__` with `TPUStrategyV2.__init__`.
from tensorflow.python.distribute import distribute_utils
from tensorflow.python.distribute import tpu_strategy as tf_tpu_strategy
from tensorflow.python.ops import control_flow_util

from gshard_tf.sharding.annotations import shard
from gshard_tf.sharding.mesh import axis_sizes, create_mesh, use_mesh
from gshard_tf.sharding.rules import AxisRules
from gshard_tf.sharding.sharded_variable import MeshVariableBase
from gshard_tf.spmd.base import MeshStrategy
from gshard_tf.tpu.device_assignment import assign_cores
from gshard_tf.tpu.initial_value import InitialValue
from gshard_tf.tpu.layouts import CoreLayouts
from gshard_tf.tpu.partitioner_faults import PartitionerFaults
from gshard_tf.tpu.restore_patch import pass_on_all_slices
from gshard_tf.tpu.storage import Storage
from gshard_tf.tpu.system import connect
from gshard_tf.tpu.variables import CoreShards, MeshTPUSyncOnRead, MeshTPUVariable


def tpu_strategy(
    tpu: str | tf.distribute.cluster_resolver.ClusterResolver | None = None,
    mesh: dtensor.Mesh | Mapping[str, int] | None = None,
    rules: AxisRules | None = None,
    topology: tf.tpu.experimental.Topology | None = None,
) -> "MeshTPUStrategy":
    """A `tf.distribute.TPUStrategy` in SPMD mode whose weights lie split on a mesh.

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
            VM. It is connected to and initialised, which clears its memory. Or a
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
    """What `tpu_strategy` makes.

    Args:
        resolver: The resolver of a TPU that is connected to and initialised.
        topology: Its topology.
        mesh: The cores of one replica.
        rules: The rules, or None.
    """

    unowned_hint = " (On a mesh of one core, TensorFlow keeps all variables as always.)"

    def __init__(
        self,
        resolver: tf.distribute.cluster_resolver.ClusterResolver,
        topology: tf.tpu.experimental.Topology,
        mesh: dtensor.Mesh,
        rules: AxisRules | None = None,
    ):
        # Not TPUStrategy's own constructor, which would make its own extended half.
        tf.distribute.Strategy.__init__(
            self, MeshTPUExtended(self, resolver, topology, mesh, rules)
        )
        # Packing makes one handle of those of all cores; parts need their own.
        self._enable_packed_variable_in_eager_mode = mesh.size == 1

    @property
    def device_assignment(self) -> tf.tpu.experimental.DeviceAssignment:
        """Which core of the slice each position of the mesh is, in each replica."""
        return self.extended._device_assignment


class MeshTPUExtended(tf_tpu_strategy.TPUExtended):
    """What `tf.distribute` asks of the strategy behind its public face."""

    def __init__(
        self,
        container: MeshTPUStrategy,
        resolver: tf.distribute.cluster_resolver.ClusterResolver,
        topology: tf.tpu.experimental.Topology,
        mesh: dtensor.Mesh,
        rules: AxisRules | None,
    ):
        rules = AxisRules.default(mesh) if rules is None else rules
        rules.check(mesh)
        super().__init__(
            container,
            resolver,
            device_assignment=assign_cores(topology, mesh),
            use_spmd_for_xla_partitioning=mesh.size > 1,
        )
        self.mesh = mesh
        self.layouts = CoreLayouts(mesh, rules)
        self._faults = PartitionerFaults(axis_sizes(mesh))
        pass_on_all_slices()

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
        storage = Storage(
            self._tpu_devices,
            self.layouts,
            initial,
            name=kwargs.get("name") or "Variable",
            trainable=kwargs.get("trainable") is not False,
        )
        variable = distribute_utils.create_mirrored_variable(
            self._container_strategy(),
            lambda **_: [CoreShards(storage, r) for r in range(len(self._tpu_devices))],
            {
                tf.VariableSynchronization.ON_WRITE: MeshTPUVariable,
                tf.VariableSynchronization.ON_READ: MeshTPUSyncOnRead,
            },
            distribute_utils.TPU_VARIABLE_POLICY_MAPPING,
            **kwargs,
        )
        storage.belongs_to(variable)
        self.layouts.register(variable, reference)
        return variable

    def owns(self, value: Any) -> bool:
        """Whether it is a variable that this strategy stores on its mesh."""
        return isinstance(value, MeshTPUVariable | MeshTPUSyncOnRead) and (
            value.distribute_strategy is self._container_strategy()
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
        # core. From the host, each core gets its part.
        if options is None and self.mesh.size > 1:
            return tf.distribute.InputOptions(experimental_fetch_to_device=False)
        return options

    # -- steps -----------------------------------------------------------------------

    def tpu_run(self, fn: Callable, args: Any, kwargs: Any, options: Any = None) -> Any:
        if control_flow_util.GraphOrParentsInXlaContext(
            tf.compat.v1.get_default_graph()
        ):
            raise ValueError(
                "A TPU program is compiled by the TPU, so strategy.run cannot stand "
                "inside a function with jit_compile=True. Compile a Keras model with "
                "jit_compile='auto' (the default) or False. Received: jit_compile=True"
            )
        if self.mesh.size == 1:
            return super().tpu_run(fn, args, kwargs, options)
        with use_mesh(self.mesh, self.layouts.rules):
            result = super().tpu_run(self._on_the_mesh(fn), args, kwargs, options)
        self.layouts.warn_once()
        return result

    def _on_the_mesh(self, fn: Callable) -> Callable:
        """`fn` with its arguments split by examples before anything else sees them.

        A TPU's host then sends each core its part of them, and no more. Of what XLA may
        get wrong in it, it warns.
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
        return shard(value, self.layouts.batch_layout(value.shape))
