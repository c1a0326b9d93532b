"""`SpmdStrategy`: a `tf.distribute.Strategy` whose step is one partitioned program."""

import collections
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from tensorflow.experimental import dtensor

# Private API: the extended half of OneDeviceStrategy, which feeds one global batch to
# one replica, as we do. On an upgrade, check `_create_variable` and
# `_call_for_each_replica`.
from tensorflow.python.distribute import one_device_strategy

# Private API: whether a graph is going to be compiled by TensorFlow itself.
from tensorflow.python.ops import control_flow_util

from gshard_tf import lowering
from gshard_tf.keras_threads import keras_state, use_keras_state
from gshard_tf.layouts import Layouts
from gshard_tf.mesh import use_mesh
from gshard_tf.program import Placement, SpmdProgram
from gshard_tf.report import Description, describe
from gshard_tf.rules import AxisRules
from gshard_tf.variables import MeshVariable


class NonFiniteError(FloatingPointError, ValueError):
    """NaN or infinity in a step; TensorFlow reports it as `InvalidArgumentError`."""


class SpmdStrategy(tf.distribute.Strategy):
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

    Raises:
        ValueError: when the mesh does not fit the devices, or a rule does not fit
            the mesh.
    """

    def __init__(
        self,
        mesh: dtensor.Mesh,
        rules: AxisRules | None = None,
        check_numerics: bool = False,
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
        rules = AxisRules.default(mesh) if rules is None else rules
        if not isinstance(rules, AxisRules):
            raise ValueError(f"rules is an AxisRules. Received: {rules!r}")
        rules.check(mesh)
        super().__init__(SpmdExtended(self, mesh, rules, check_numerics))

    @property
    def mesh(self) -> dtensor.Mesh:
        return self.extended.mesh

    @property
    def rules(self) -> AxisRules:
        return self.extended.layouts.rules

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

    def layout(self, variable: tf.Variable | keras.Variable) -> dtensor.Layout:
        """The layout in which a variable of this strategy is stored."""
        return self.extended.layouts.of(self.extended.ours(variable)).layout

    def describe(self, model: keras.Model) -> Description:
        """How each weight and optimizer slot of a built model is stored, and why.

        Returns:
            A `Description`; `print` it for a table.
        """
        return describe(model, self.extended.layouts, self.extended.ours)


class SpmdExtended(one_device_strategy.OneDeviceExtended):
    """What `tf.distribute` asks of a strategy behind its public face."""

    def __init__(
        self,
        container: SpmdStrategy,
        mesh: dtensor.Mesh,
        rules: AxisRules,
        check_numerics: bool,
    ):
        super().__init__(container, "/cpu:0")
        self.mesh = mesh
        self.layouts = Layouts(mesh, rules)
        self.placement = Placement(mesh)
        self.check_numerics = check_numerics
        self.residence = _Residence(self.placement)
        self.programs: list[weakref.ref] = []
        self.steps_run: collections.Counter[str] = collections.Counter()
        self.last_error: Exception | None = None
        self._graph_functions = weakref.WeakKeyDictionary()
        self._tracing = _Tracing()

    def _create_variable(self, next_creator: Callable, **kwargs: Any) -> tf.Variable:
        del next_creator  # it would make a plain variable
        reference = kwargs.pop("colocate_with", None)
        for unused in ("use_resource", "experimental_batch_initialization"):
            kwargs.pop(unused, None)
        with tf.device(self._device):
            variable = MeshVariable(**kwargs)
        self.layouts.note_created(variable, reference)
        variable.residence = self.residence
        return variable

    def ours(self, variable: tf.Variable | keras.Variable) -> MeshVariable:
        """The variable itself; raises `ValueError` for one that is not ours."""
        value = variable.value if isinstance(variable, keras.Variable) else variable
        if getattr(value, "residence", None) is not self.residence:
            name = getattr(variable, "path", getattr(variable, "name", variable))
            raise ValueError(
                f"The variable {name!r} was not made inside this SpmdStrategy's "
                "scope, so it does not live on its mesh. Make the model, and compile "
                "it, inside `with strategy.scope():`."
            )
        return value

    def _validate_colocate_with_variable(self, colocate_with_variable: Any) -> None:
        self.ours(colocate_with_variable)

    def _experimental_distribute_dataset(self, dataset: Any, options: Any) -> Any:
        # One replica takes the global batch, and the program cuts it up; a
        # distributed iterator would only add threads that are slow to stop.
        del options
        return dataset

    def _distribute_datasets_from_function(
        self, dataset_fn: Callable, options: Any
    ) -> Any:
        del options
        return dataset_fn(tf.distribute.InputContext())

    def _call_for_each_replica(self, fn: Callable, args: tuple, kwargs: dict) -> Any:
        if self._tracing.depth:
            # The step calls for itself again, as Keras's LossScaleOptimizer does.
            return super()._call_for_each_replica(fn, args, kwargs)
        if not tf.executing_eagerly():
            _check_not_compiled()
            return _Step(self, fn, (args, kwargs)).emit()
        if isinstance(fn, tf.types.experimental.PolymorphicFunction):
            return self._in_graph(fn)(args, kwargs)
        # Eager mode runs operation by operation, on the host, as everywhere in
        # TensorFlow: for debugging (`run_eagerly=True`).
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

    def call_fn(self, fn: Callable, args: tuple, kwargs: dict) -> Any:
        """Calls `fn` as the step of the only replica, with annotations switched on."""
        self._tracing.depth += 1
        try:
            with use_mesh(self.mesh, self.layouts.rules):
                return super()._call_for_each_replica(fn, args, kwargs)
        finally:
            self._tracing.depth -= 1


class _Tracing(threading.local):
    """How many steps this thread is tracing, one inside the other."""

    depth = 0


class _Step:
    """One function that Keras runs, and its programs, one per set of shapes."""

    def __init__(self, extended: SpmdExtended, fn: Callable, arguments: Any):
        self.extended = extended
        self.fn = fn
        self.name = getattr(fn, "__name__", "step")
        flat = tf.nest.flatten(arguments)
        for leaf in flat:
            _check_dense_number(leaf)
        self.tensors = [leaf for leaf in flat if _is_array(leaf)]
        # Whatever is no tensor (None, a Python number, a variable) is part of the
        # program.
        self.arguments = tf.nest.pack_sequence_as(
            arguments, [_ARGUMENT if _is_array(leaf) else leaf for leaf in flat]
        )
        self.keras_state = keras_state()
        self.executables: dict[Any, _Executable] = {}

    def trace(self, specs: list[tf.TensorSpec]) -> tuple[Any, Any]:
        def step(*tensors):
            values = iter(tensors)
            args, kwargs = tf.nest.map_structure(
                lambda leaf: next(values) if leaf is _ARGUMENT else leaf, self.arguments
            )
            return self.extended.call_fn(self.fn, args, kwargs)

        return lowering.trace(step, specs)

    def emit(self) -> Any:
        """Puts a call of the program into the graph that is being traced."""
        specs = [tf.TensorSpec(x.shape, x.dtype) for x in self.tensors]
        function, structure = self.trace(specs)
        for value in lowering.captured(function):
            if isinstance(value, tf.Variable):
                self.extended.ours(value)
        if all(spec.shape.is_fully_defined() for spec in specs):
            self._add(specs, function, structure)
        tensors, self.tensors = self.tensors, []
        _keep_with_graph(self)
        outputs = tf.numpy_function(
            _Call(self),
            tensors,
            [output.dtype for output in function.outputs],
            stateful=True,
            name="gshard_step",
        )
        if not function.outputs:
            # An operation without results; it runs because it is stateful.
            outputs = []
        for output, traced in zip(outputs, function.outputs, strict=True):
            output.set_shape(traced.shape)
        return lowering.pack(structure, outputs)

    def run(self, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Runs the program for arrays of these shapes."""
        try:
            return self._executable(arrays)(arrays)
        except Exception as error:
            # TensorFlow makes a `tf.errors` of it with the same message.
            self.extended.last_error = error
            raise

    def _executable(self, arrays: Sequence[np.ndarray]) -> "_Executable":
        specs = [tf.TensorSpec(x.shape, x.dtype) for x in arrays]
        if _key(specs) not in self.executables:
            # A shape that was unknown when the graph was traced: the length of this
            # batch, say. This thread has no strategy, so enter it.
            strategy = self.extended._container_strategy()
            with use_keras_state(self.keras_state), strategy.scope():
                self._add(specs, *self.trace(specs))
        return self.executables[_key(specs)]

    def _add(self, specs: list[tf.TensorSpec], function: Any, structure: Any) -> None:
        step = lowering.lower(function, structure)
        self.executables[_key(specs)] = _Executable(self.extended, step, self.name)


class _Call:
    """What a graph calls for a step, without keeping it alive.

    TensorFlow keeps Python functions of graphs for the life of the process, and a step
    has a hold of a model, its state on the devices and the compiled programs.
    """

    def __init__(self, step: _Step):
        self.step = weakref.ref(step)

    def __call__(self, *arrays: np.ndarray) -> list[np.ndarray]:
        return self.step().run(arrays)


def _keep_with_graph(step: _Step) -> None:
    """Keeps `step` for as long as the functions that can run it."""
    graph = tf.compat.v1.get_default_graph()
    while graph is not None and graph.building_function:
        # All of them: the graph of a loop's body dies once it is built.
        graph._gshard_steps = [*getattr(graph, "_gshard_steps", []), step]
        graph = graph.outer_graph


class _Executable:
    """A program and the variables that it runs on; compiled when first called."""

    def __init__(self, extended: SpmdExtended, step: lowering.LoweredStep, name: str):
        self.extended = extended
        self.step = step
        self.name = name
        self.program: SpmdProgram | None = None
        self.constants: dict[int, Any] = {}

    def __call__(self, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
        extended, step = self.extended, self.step
        with extended.residence.lock:
            if self.program is None:
                self._compile()
            program, layouts = self.program, self.program.capture_layouts
            extended.steps_run[self.name] += 1
            if extended.check_numerics:
                self._check_finite(arrays, lambda i: f"argument {i}")
            captures = [
                value.take_device_value(
                    lambda array, layout=layout: extended.placement.put(array, layout)
                )
                if isinstance(value, MeshVariable)
                else self.constants[i]
                for i, (value, layout) in enumerate(
                    zip(step.captures, layouts, strict=True)
                )
            ]
            outputs, updated = program(program.put_inputs(arrays), captures)
            if extended.check_numerics:
                self._check_finite(outputs, lambda i: f"result {i}")
                self._check_finite(
                    updated,
                    lambda i: (
                        f"the new value of {_path(step.captures[step.updates[i]])}"
                    ),
                )
            # At once: the old values are gone, their memory is reused.
            for i, value in zip(step.updates, updated, strict=True):
                step.captures[i].set_device_value(value)
            return [np.asarray(output) for output in outputs]

    def _check_finite(self, values: Any, name: Callable[[int], str]) -> None:
        for i, value in enumerate(values):
            if not _is_finite(value):
                shape = tuple(value.shape)
                raise NonFiniteError(
                    f"Found NaN or infinity in {name(i)} (shape {shape}) of step "
                    f"{self.extended.steps_run[self.name]} of {self.name}. The model "
                    "and its optimizer are as they were before that step."
                )

    def _compile(self) -> None:
        extended, step = self.extended, self.step
        layouts = []
        for value in step.captures:
            if isinstance(value, MeshVariable):
                layouts.append(extended.layouts.of(value).layout)
            else:
                layouts.append(
                    dtensor.Layout.replicated(extended.mesh, value.shape.rank)
                )
        extended.layouts.warn_once()
        self.program = SpmdProgram(
            step,
            extended.placement,
            [extended.layouts.of_batch(spec.shape) for spec in step.inputs],
            [
                extended.layouts.of_batch(spec.shape)
                for spec in step.results[: step.num_outputs]
            ],
            layouts,
            donate=not extended.check_numerics,
        )
        self.constants = {
            i: extended.placement.put(value.numpy(), layouts[i])
            for i, value in enumerate(step.captures)
            if not isinstance(value, MeshVariable)
        }
        extended.programs.append(weakref.ref(self.program))


class _Residence:
    """Brings variables back to the host, one user at a time."""

    def __init__(self, placement: Placement):
        self.lock = threading.RLock()
        self.to_host = placement.get


_ARGUMENT = lowering.LEAF


def _key(specs: list[tf.TensorSpec]) -> tuple:
    return tuple((tuple(spec.shape), spec.dtype.name) for spec in specs)


def _is_array(leaf: Any) -> bool:
    return isinstance(leaf, np.ndarray) or (
        tf.is_tensor(leaf) and not isinstance(leaf, tf.Variable | keras.Variable)
    )


def _check_dense_number(leaf: Any) -> None:
    if isinstance(leaf, tf.RaggedTensor | tf.SparseTensor):
        raise ValueError(
            "A mesh needs dense inputs of static shape. Make them dense in the input "
            f"pipeline. Received: {leaf}"
        )
    dtype = tf.as_dtype(leaf.dtype) if _is_array(leaf) else None
    if dtype is not None and not (
        dtype.is_bool or dtype.is_integer or dtype.is_floating or dtype.is_complex
    ):
        raise ValueError(
            "A mesh computes with numbers. Turn strings to numbers in the input "
            f"pipeline. Received: {leaf} of dtype {dtype.name}"
        )


def _is_finite(value: Any) -> bool:
    # numpy sees bfloat16 as a type of its own kind, "V".
    if value.dtype.kind not in "fcV":
        return True
    value = np.asarray(value)
    if value.dtype.kind == "V":
        value = value.astype(np.float32)
    return bool(np.all(np.isfinite(value)))


def _path(variable: Any) -> str:
    keras_variable = variable.keras_variable and variable.keras_variable()
    return repr(variable.name if keras_variable is None else keras_variable.path)


def _check_not_compiled() -> None:
    if control_flow_util.GraphOrParentsInXlaContext(tf.compat.v1.get_default_graph()):
        raise ValueError(
            "SpmdStrategy compiles the whole step itself, so it cannot stand inside a "
            "function with jit_compile=True. Compile a Keras model with "
            "jit_compile='auto' (the default) or False. Received: jit_compile=True"
        )
