"""`SpmdStrategy`: a `tf.distribute.Strategy` whose step is one partitioned program."""

import collections
import dataclasses
import os
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from tensorflow.experimental import dtensor

# Private API: whether a graph is going to be compiled by TensorFlow itself.
from tensorflow.python.ops import control_flow_util

from gshard_tf.compat.keras_fit import BuildingMayFail, read_no_batch_to_build
from gshard_tf.export import exporter
from gshard_tf.runtime.process_group import group
from gshard_tf.sharding.layout_report import Description
from gshard_tf.sharding.regions import Region, assemble
from gshard_tf.sharding.rules import AxisRules
from gshard_tf.sharding.variable_layouts import Layouts
from gshard_tf.spmd.base import MeshExtended
from gshard_tf.spmd.input_checks import InputChecks
from gshard_tf.spmd.on_mesh import OnMesh
from gshard_tf.spmd.program import Placement, SpmdProgram, named_sharding
from gshard_tf.spmd.step import SkippedStep, Step
from gshard_tf.spmd.variable import MeshVariable


class SpmdStrategy(OnMesh, tf.distribute.Strategy):
    """Trains, evaluates and predicts with one program partitioned over a mesh.

    Keras sees one replica and one global batch. Each step that it runs is lowered
    with the variables it captures, partitioned by XLA as the layers' annotations
    say, and run on the mesh. The state stays there, split, and is handed on from
    step to step; whoever reads a variable gets its fresh value.

    ```python
    gshard_tf.request_cpu_devices(8)  # CPU only
    strategy = gshard_tf.SpmdStrategy(gshard_tf.create_mesh({"expert": 8}))
    with strategy.scope():
        model = ...
        model.compile("adam", "mse")
    model.fit(x, y)
    ```

    Args:
        mesh: A mesh from `gshard_tf.create_mesh`, over CPU or GPU devices.
        rules: An `AxisRules`; defaults to the paper's layout for the mesh,
            `AxisRules.default(mesh)`.
        check_numerics: Whether to look for NaN and infinity in every step's
            arguments, results and new state. A step that has any changes nothing and
            raises `tf.errors.InvalidArgumentError`, which names the step and what it
            was found in. It costs a second copy of the state, and a look at all of
            it at every step. Defaults to False.
        own_rows: With several processes (`initialize`): whether each of them feeds
            its own rows of every batch, in their order, rather than all rows. Defaults
            to False: the same input pipeline everywhere, of which each process keeps
            its part.
        check_inputs: Of how many steps the ids and labels are looked at on the host,
            before the step: of the first so many after `fit`, `evaluate` or `predict`
            begins; True: of all; False: of none. Defaults to 100. One that is out of
            range raises `tf.errors.InvalidArgumentError`, as in plain Keras on a CPU,
            with the layer or the loss, the value and the range. Without it, XLA reads
            the row of another id, and gives NaN for a label.

    Raises:
        ValueError: when the mesh does not fit the devices, a rule does not fit the
            mesh, or `check_inputs` is no such number.
    """

    def __init__(
        self,
        mesh: dtensor.Mesh,
        rules: AxisRules | None = None,
        check_numerics: bool = False,
        own_rows: bool = False,
        check_inputs: bool | int = 100,
    ):
        if not isinstance(mesh, dtensor.Mesh):
            raise ValueError(
                "mesh is a tf.experimental.dtensor.Mesh, as gshard_tf.create_mesh "
                f"makes one. Received: {mesh!r}"
            )
        if mesh.device_type() == "TPU":
            raise ValueError(
                "SpmdStrategy runs on CPU and GPU devices; on TPUs, TensorFlow's own "
                "TPUStrategy partitions. Received: mesh of TPU devices"
            )
        super().__init__(
            SpmdExtended(
                self, mesh, rules, check_numerics, own_rows, InputChecks(check_inputs)
            )
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

    def describe(self, model: keras.Model) -> Description:
        """How each weight and optimizer slot of a built model is stored, and why.

        Returns:
            A `Description`; `print` it for a table. Once a program is compiled, it
            also says what the latest one does for the partitioner's sake.
        """
        described = super().describe(model)
        rewrites = self.programs[-1].rewrites if self.programs else ()
        return dataclasses.replace(described, rewrites=rewrites)

    def program(
        self, model: keras.Model, mode: str = "train", batch: Any = None
    ) -> exporter.StepProgram:
        """A step of a model as a program that can be saved and run without TensorFlow.

        ```python
        strategy.save_state(model, "run/state.npz")
        program = strategy.program(model, "train", batch=(x[:64], y[:64]))
        program.save("run/train.gshard", initial_state="state.npz")
        ```

        and, where there is jax and nothing else, `python -m gshard_tf.export.runner`.

        Args:
            model: A model of this strategy; compiled, unless it is only to predict.
            mode: "train", "evaluate" or "predict".
            batch: What `fit` passes to a step: `(x, y)` or `(x, y, sample_weight)`,
                or `x` alone, each a nest of arrays, `tf.TensorSpec` or
                `keras.KerasTensor`. The *global* batch; a program is for one shape.

        Returns:
            What can be saved; nothing is compiled.

        Raises:
            ValueError: for an unknown mode, a batch without static shapes, or a model
                that is not compiled or not of this strategy.
        """
        return exporter.StepProgram(self, model, mode, batch)

    def save_state(
        self, model: keras.Model, path: str | os.PathLike, step: int = 0
    ) -> None:
        """Writes the variables of a model, its metrics and its optimizer to a file.

        Args:
            model: A model that is built and compiled, as the first step leaves it.
            path: An `.npz` file on a local or mounted disk; one that is there is
                replaced.
            step: How many steps the model has been trained, for the runner to go on
                with.

        Raises:
            ValueError: when `path` is remote, `gs://` say.
        """
        exporter.save_state(model, path, step)

    def load_state(self, model: keras.Model, path: str | os.PathLike) -> dict[str, Any]:
        """Gives a model the state of a file that `save_state` or the runner wrote.

        Args:
            model: The model that it is the state of, or one made by the same code.
            path: The file.

        Returns:
            What the file says besides: `step`, the number of steps done.

        Raises:
            ValueError: when the file does not fit the model; nothing is changed then.
        """
        return exporter.load_state(model, path)


class SpmdExtended(MeshExtended):
    """What `tf.distribute` asks of `SpmdStrategy` behind its public face."""

    def __init__(
        self,
        container: SpmdStrategy,
        mesh: dtensor.Mesh,
        rules: AxisRules | None,
        check_numerics: bool,
        own_rows: bool,
        input_checks: InputChecks,
    ):
        super().__init__(container, mesh, rules)
        self.placement = Placement(mesh)
        self.check_numerics = check_numerics
        self._own_rows = own_rows
        self.input_checks = input_checks
        self.residence = _Residence(self.placement, self.layouts)
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
        self._graph_functions = weakref.WeakKeyDictionary()

    @property
    def row_share(self) -> int:
        """How many times as many rows a step has as this process feeds."""
        return group().count if self._own_rows else 1

    def global_specs(self, values: Sequence[Any]) -> list[tf.TensorSpec]:
        """The specs of the arguments of a step over all processes.

        Args:
            values: What this process feeds.
        """
        share = self.row_share
        specs = []
        for value in values:
            shape = tf.TensorShape(value.shape)
            if share > 1 and shape.rank and shape[0] is not None:
                shape = tf.TensorShape([shape[0] * share, *shape[1:]])
            specs.append(tf.TensorSpec(shape, value.dtype))
        return specs

    def make_variable(self, **kwargs: Any) -> MeshVariable:
        variable = MeshVariable(**kwargs)
        variable.residence = self.residence
        return variable

    def is_ours(self, value: Any) -> bool:
        return getattr(value, "residence", None) is self.residence

    def _scope(self, strategy: tf.distribute.Strategy) -> BuildingMayFail:
        return BuildingMayFail(super()._scope(strategy))

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
            return Step(self, fn, (args, kwargs)).emit()
        if (
            isinstance(fn, tf.types.experimental.PolymorphicFunction)
            and not tf.config.functions_run_eagerly()
        ):
            return self._in_graph(fn)(args, kwargs)
        # Eager mode runs operation by operation, on the host, as everywhere in
        # TensorFlow: for debugging (`run_eagerly=True` of one model,
        # `tf.config.run_functions_eagerly` of all functions).
        return super()._call_for_each_replica(fn, args, kwargs)

    def _in_graph(self, fn: Callable) -> Callable:
        """A function that runs `fn` as a step; the same one for the same `fn`."""
        if fn not in self._graph_functions:
            # Held weakly, so that the program goes when the user's function goes.
            proxy = weakref.proxy(fn)

            @tf.function(autograph=False)
            def run(args, kwargs):
                return self._call_for_each_replica(proxy, args, kwargs)

            self._graph_functions[fn] = run
        return self._graph_functions[fn]


class _Residence:
    """Moves variables between the mesh and elsewhere, one user at a time."""

    def __init__(self, placement: Placement, layouts: Layouts):
        self.lock = threading.RLock()
        self.mesh = placement.mesh
        self.to_host = placement.get
        self._placement = placement
        self._layouts = layouts

    def layout(self, variable: MeshVariable) -> dtensor.Layout:
        return self._layouts.of(variable).layout

    def assemble(
        self, variable: MeshVariable, read: Callable[[Region], np.ndarray]
    ) -> Any:
        sharding = named_sharding(self.layout(variable), self._placement.jax_mesh)
        return assemble(tuple(variable.shape), sharding, read)


def _check_not_compiled() -> None:
    if control_flow_util.GraphOrParentsInXlaContext(tf.compat.v1.get_default_graph()):
        raise ValueError(
            "SpmdStrategy compiles the whole step itself, so it cannot stand inside a "
            "function with jit_compile=True. Compile a Keras model with "
            "jit_compile='auto' (the default) or False. Received: jit_compile=True"
        )
