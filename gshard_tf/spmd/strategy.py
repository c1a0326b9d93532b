"""`SpmdStrategy`: a `tf.distribute.Strategy` whose step is one partitioned program."""

import collections
import dataclasses
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from tensorflow.experimental import dtensor

from gshard_tf.compat.keras_fit import BuildingMayFail, read_no_batch_to_build
from gshard_tf.compat.keras_variables import current_initializer
from gshard_tf.compat.tf_graphs import is_compiled_by_tensorflow
from gshard_tf.runtime.device_arrays import Placement
from gshard_tf.runtime.process_group import group
from gshard_tf.runtime.visible_gpus import hide_gpus_from_tensorflow
from gshard_tf.sharding.initial_value import InitialValue, is_stateless
from gshard_tf.sharding.layout_map import as_mesh
from gshard_tf.sharding.layout_report import LayoutReport
from gshard_tf.sharding.rules import AxisRules
from gshard_tf.spmd import resources
from gshard_tf.spmd.base import ExplainedScope, MeshExtended, MeshStrategy
from gshard_tf.spmd.eager_run import EagerRun
from gshard_tf.spmd.input_checks import InputChecks
from gshard_tf.spmd.nonfinite import SkippedStep
from gshard_tf.spmd.program import SpmdProgram
from gshard_tf.spmd.step import Step
from gshard_tf.spmd.variable import MeshVariable, VariableTransfer


# A `OneDeviceStrategy`, since that is what a user of it sees: one replica. Keras 2
# scales losses (`mixed_float16`) under strategies of a few known classes only.
class SpmdStrategy(MeshStrategy, tf.distribute.OneDeviceStrategy):
    """Trains, evaluates and predicts with one program partitioned over a mesh.

    Keras sees one replica and one global batch. Each step that it runs is lowered
    with the variables it captures, partitioned by XLA as the layers' annotations
    say, and run on the mesh. The state stays there, split, and is passed from step to
    step; every reader of a variable gets its current value.

    ```python
    gshard_tf.request_cpu_devices(8)  # CPU only
    strategy = gshard_tf.SpmdStrategy(gshard_tf.create_mesh({"expert": 8}))
    with strategy.scope():
        model = ...
        model.compile("adam", "mse")
    model.fit(x, y)
    ```

    Args:
        mesh: A mesh from `gshard_tf.create_mesh`, or a `keras.distribution.DeviceMesh`.
            Its devices are jax's: CPU, GPU or TPU. TensorFlow stays on the CPU, where
            it traces; GPUs are hidden from it.
        rules: An `AxisRules`, or a `keras.distribution.LayoutMap`, which lays weights
            out as `keras.distribution.ModelParallel` does on jax. Defaults to the
            paper's layout for the mesh, `AxisRules.default(mesh)`.
        check_numerics: Whether to look for NaN and infinity in every step's
            arguments, results and new state. A step that has any changes nothing and
            raises `tf.errors.InvalidArgumentError`, which names the step and what it
            was found in. It costs a second copy of the state, and a look at all of
            it at every step. Defaults to False.
        process_local_batches: With several processes (`initialize`): whether each
            of them feeds its own rows of every batch, in their order, rather than all
            rows. Defaults to False: the same input pipeline everywhere, of which each
            process keeps its part.
        check_inputs: The number of steps whose ids and labels are checked on the host,
            counted from where `fit`, `evaluate` or `predict` begins; True: all; False:
            none. Defaults to 100. One that is out of range raises
            `tf.errors.InvalidArgumentError`, as in plain Keras on a CPU, with the layer
            or the loss, the value and the range. Without it, XLA reads the row of
            another id, and gives NaN for a label.
        host_copy_bytes: The size up to which a variable keeps a copy on the host, in
            each process. A larger one exists only as its shards on the devices; it is
            made, written and checkpointed shard by shard, and put together for those
            who read it. Defaults to 1 MiB. 0: no variable keeps one.

    Raises:
        ValueError: when the mesh does not fit the devices, jax finds none of its type,
            a rule does not fit the mesh, or `check_inputs` or `host_copy_bytes` is
            invalid.
        ImportError: for a mesh of TPU devices where tensorflow-tpu is installed.
        RuntimeError: for a mesh of GPU devices when TensorFlow has started with them.
    """

    extended: "SpmdExtended"

    def __init__(
        self,
        mesh: dtensor.Mesh | keras.distribution.DeviceMesh,
        rules: AxisRules | keras.distribution.LayoutMap | None = None,
        check_numerics: bool = False,
        process_local_batches: bool = False,
        check_inputs: bool | int = 100,
        host_copy_bytes: int = 1 << 20,
    ):
        if isinstance(host_copy_bytes, bool) or host_copy_bytes < 0:
            raise ValueError(
                "`host_copy_bytes` must be a number of bytes. Received: "
                f"host_copy_bytes={host_copy_bytes!r}"
            )
        mesh = as_mesh(mesh)
        placement = Placement(mesh)
        if mesh.device_type() == "GPU":
            # Before the strategy starts TensorFlow.
            hide_gpus_from_tensorflow()
        # Not that of `OneDeviceStrategy`, which takes a device.
        tf.distribute.Strategy.__init__(
            self,
            SpmdExtended(
                self,
                placement,
                rules,
                check_numerics,
                process_local_batches,
                InputChecks(check_inputs),
                host_copy_bytes,
            ),
        )

    @property
    def last_error(self) -> Exception | None:
        """The latest exception of a step, as it was raised, or None.

        TensorFlow turns an exception that comes out of a graph into a `tf.errors` of
        its own with the same message; this is the original.
        """
        return self.extended.last_error

    @property
    def programs(self) -> list[SpmdProgram]:
        """The programs compiled so far that are still in use, oldest first."""
        return [p for p in (ref() for ref in self.extended.programs) if p is not None]

    def describe(self, model: keras.Model) -> LayoutReport:
        """Returns the layout of each weight and slot of a built model, with its reason.

        Returns:
            A `LayoutReport`; `print` it for a table. Once a program is compiled, it
            also lists what was rewritten in it for the partitioner.
        """
        described = super().describe(model)
        rewrites = self.programs[-1].rewrites if self.programs else ()
        return dataclasses.replace(described, rewrites=rewrites)


class SpmdExtended(MeshExtended):
    """`StrategyExtended` of `SpmdStrategy`: its variables, programs and checks."""

    def __init__(
        self,
        container: SpmdStrategy,
        placement: Placement,
        rules: AxisRules | keras.distribution.LayoutMap | None,
        check_numerics: bool,
        process_local_batches: bool,
        input_checks: InputChecks,
        host_copy_bytes: int,
    ):
        super().__init__(container, placement.mesh, rules)
        self.placement = placement
        self.check_numerics = check_numerics
        self._process_local_batches = process_local_batches
        self.input_checks = input_checks
        self._host_copy_bytes = host_copy_bytes
        self.transfer = VariableTransfer(self.placement, self.layouts)
        self.programs: list[weakref.ref] = []
        self.steps_run: collections.Counter[str] = collections.Counter()
        # Set by `NonFiniteGuard`, for as long as a step of its `fit` runs.
        self.keep_finite = False
        self.skipped_steps: list[SkippedStep] = []
        # Set by `VerifyFirstStep`: called with the next step, its HLO and arguments.
        self.before_step: Callable[[Step, Any, Sequence[np.ndarray]], None] | None = (
            None
        )
        self.last_error: Exception | None = None
        self._eager_runs: weakref.WeakKeyDictionary[Callable, EagerRun] = (
            weakref.WeakKeyDictionary()
        )

    @property
    def row_share(self) -> int:
        """The rows of a step for each row that this process feeds."""
        return group().count if self._process_local_batches else 1

    def global_specs(self, values: Sequence[Any]) -> list[tf.TensorSpec]:
        """The specs of the arguments of a step over all processes.

        Args:
            values: The arguments that this process feeds.
        """
        share = self.row_share
        specs = []
        for value in values:
            shape = tf.TensorShape(value.shape)
            if share > 1 and shape.rank and shape[0] is not None:
                shape = tf.TensorShape([shape[0] * share, *shape[1:]])
            specs.append(tf.TensorSpec(shape, value.dtype))
        return specs

    def create_variable(self, **kwargs: Any) -> MeshVariable:
        initial = None
        if kwargs.get("dtype") is not None and is_stateless(current_initializer()):
            value = InitialValue(
                kwargs["initial_value"], kwargs.get("shape"), kwargs["dtype"]
            )
            if self._is_large(value):
                # It is made on the devices. (Another function is called once, and now.)
                initial = value
                kwargs["initial_value"] = resources.untouched(value.shape, value.dtype)
        variable = MeshVariable(**kwargs)
        variable.transfer = self.transfer
        variable.is_large = self._is_large(variable)
        if initial is not None:
            variable.begin_as(initial)
        return variable

    def _is_large(self, value: MeshVariable | InitialValue) -> bool:
        size = (value.shape.num_elements() or 0) * value.dtype.size
        return size > self._host_copy_bytes

    def owns(self, value: Any) -> bool:
        return getattr(value, "transfer", None) is self.transfer

    def _scope(self, strategy: tf.distribute.Strategy) -> ExplainedScope:
        return ExplainedScope(BuildingMayFail(super()._scope(strategy)))

    def _experimental_distribute_dataset(self, dataset: Any, options: Any) -> Any:
        # One replica takes the global batch, and the program cuts it up; a
        # distributed iterator would only add threads that are slow to stop.
        del options
        read_no_batch_to_build()
        self.input_checks.restart()
        return dataset

    def _distribute_datasets_from_function(
        self, dataset_fn: Callable, options: Any
    ) -> Any:
        del options
        return dataset_fn(tf.distribute.InputContext())

    def _call_for_each_replica(self, fn: Callable, args: tuple, kwargs: dict) -> Any:
        if self.is_tracing:
            # The step calls for itself again, as Keras's LossScaleOptimizer does.
            return super()._call_for_each_replica(fn, args, kwargs)
        if not tf.executing_eagerly():
            _check_not_compiled()
            return Step(self, fn, (args, kwargs)).call_from_graph()
        if (
            isinstance(fn, tf.types.experimental.PolymorphicFunction)
            and not tf.config.functions_run_eagerly()
        ):
            if fn not in self._eager_runs:
                self._eager_runs[fn] = EagerRun(self, fn)
            return self._eager_runs[fn](args, kwargs)
        # Eager mode runs operation by operation, on the host, as everywhere in
        # TensorFlow: for debugging (`run_eagerly=True` of one model,
        # `tf.config.run_functions_eagerly` of all functions).
        return super()._call_for_each_replica(fn, args, kwargs)


def _check_not_compiled() -> None:
    if is_compiled_by_tensorflow(tf.compat.v1.get_default_graph()):
        raise ValueError(
            "SpmdStrategy compiles the whole step itself, so it cannot stand inside a "
            "function with jit_compile=True. Compile a Keras model with "
            "jit_compile='auto' (the default) or False. Received: jit_compile=True"
        )
