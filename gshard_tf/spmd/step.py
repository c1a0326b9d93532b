"""One function that Keras runs as a step, and its programs, one per set of shapes."""

import contextlib
import dataclasses
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import keras
import numpy as np
import tensorflow as tf

from gshard_tf.compat.keras_loops import steps_of_loop
from gshard_tf.compat.keras_seeds import global_seed_state
from gshard_tf.compat.keras_threads import keras_state, use_keras_state
from gshard_tf.runtime.operation_threads import has_two_threads
from gshard_tf.sharding.mesh import without_mesh
from gshard_tf.spmd import lowering
from gshard_tf.spmd.base import owned
from gshard_tf.spmd.borrowed_variable import BorrowedVariable
from gshard_tf.spmd.executable import Executable, StartedStep
from gshard_tf.spmd.index_uses import index_uses
from gshard_tf.spmd.loop_results import LoopResults

if TYPE_CHECKING:
    from gshard_tf.spmd.strategy import SpmdExtended


class Step:
    """One function that Keras runs, and its programs, one per set of shapes.

    Args:
        extended: The `SpmdExtended` of the strategy that runs it.
        fn: The function.
        arguments: Its arguments, `(args, kwargs)`.

    Raises:
        ValueError: when an argument is no dense tensor of numbers.
    """

    def __init__(self, extended: "SpmdExtended", fn: Callable, arguments: Any):
        self.extended = extended
        self.fn = fn
        self.name = getattr(fn, "__name__", "step")
        flat = tf.nest.flatten(arguments)
        for leaf in flat:
            _check_dense_number(leaf)
        self.tensors = [leaf for leaf in flat if _is_array(leaf)]
        # Anything but a tensor (None, a Python number, a variable) is part of the
        # program.
        self.arguments = tf.nest.pack_sequence_as(
            arguments, [lowering.LEAF if _is_array(leaf) else leaf for leaf in flat]
        )
        self.keras_state = keras_state()
        self.executables: dict[Any, Executable] = {}
        self.loop_results = LoopResults(1)
        # Of a step that is started alone, once it is traced.
        self.structure: Any = None
        self.output_specs: list[tf.TensorSpec] = []

    def trace(self, specs: list[tf.TensorSpec]) -> tuple[Any, Any]:
        return self._trace(self.fn, specs)

    def trace_alone(self, arrays: Sequence[np.ndarray], jit_compile: bool) -> Any:
        """The step for `arrays`, traced without a mesh, for compiling or not."""
        specs = self.extended.global_specs(arrays)
        with self._creation_context():
            return self._trace(without_mesh(self.fn), specs, jit_compile)[0]

    def _trace(
        self, fn: Callable, specs: list[tf.TensorSpec], jit_compile: bool = True
    ) -> tuple[Any, Any]:
        def step(*tensors):
            args, kwargs = lowering.pack(self.arguments, tensors)
            return self.extended.run_step(fn, args, kwargs)

        return lowering.trace(step, specs, jit_compile)

    def call_from_graph(self) -> Any:
        """Puts a call of the program into the graph that is being traced."""
        function, structure, tensors = self._into_graph()
        outputs = self._call(tensors, [output.dtype for output in function.outputs])
        for output, traced in zip(outputs, function.outputs, strict=True):
            output.set_shape(traced.shape)
        return lowering.pack(structure, outputs)

    def start_from_graph(self, put: Callable[["Step", StartedStep], int]) -> tf.Tensor:
        """Puts a start of the program into the graph that is being traced.

        Args:
            put: Called with this step and each of its runs; returns a number for it.

        Returns:
            The number.
        """
        function, self.structure, tensors = self._into_graph()
        self.output_specs = [
            tf.TensorSpec(output.shape, output.dtype) for output in function.outputs
        ]

        def start(step: Step, arrays: Sequence[np.ndarray]) -> np.int64:
            return np.int64(put(step, step.start(arrays)))

        return tf.numpy_function(
            _WeakCall(self, start), tensors, tf.int64, stateful=True, name="gshard_step"
        )

    def _into_graph(self) -> tuple[Any, Any, list[tf.Tensor]]:
        """Traces the step; returns it, what it returns, and its arguments."""
        specs = self.extended.global_specs(self.tensors)
        function, structure = self.trace(specs)
        # With what the trace made: Keras's global seed generator, say.
        self.keras_state = keras_state()
        for value in lowering.captured(function):
            self._captured_value(value)
        if all(spec.shape.is_fully_defined() for spec in specs):
            self._compile_for(specs, function, structure)
        tensors, self.tensors = self.tensors, []
        _keep_with_graph(self)
        return function, structure, tensors

    def _call(self, tensors: list[tf.Tensor], dtypes: list[tf.DType]) -> list[Any]:
        steps = steps_of_loop()
        if steps == 1 or not dtypes or not has_two_threads():
            outputs = tf.numpy_function(
                _WeakCall(self, Step.run),
                tensors,
                dtypes,
                stateful=True,
                name="gshard_step",
            )
            # An operation without results runs because it is stateful.
            return outputs if dtypes else []
        # Two operations: the next step may start before the results of this one are
        # read. The second is not stateful, so nothing waits for it.
        self.loop_results = LoopResults(steps)
        number = tf.numpy_function(
            _WeakCall(self, Step.start_in_loop),
            tensors,
            tf.int64,
            stateful=True,
            name="gshard_step",
        )
        return tf.numpy_function(
            _WeakCall(self, Step.read_in_loop),
            [number],
            dtypes,
            stateful=False,
            name="gshard_results",
        )

    def run(self, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Runs the program for arrays of these shapes."""
        return self.read(self.start(arrays))

    def start_in_loop(self, arrays: Sequence[np.ndarray]) -> np.int64:
        """Starts a step of Keras's loop; returns its number."""
        return np.int64(self.loop_results.put(self.start(arrays)))

    def read_in_loop(self, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Returns the results of a step of Keras's loop by its number."""
        with self._errors_kept():
            return self.loop_results.read(int(arrays[0]))

    def read(self, started: StartedStep) -> list[np.ndarray]:
        """Returns the results of a step, once it has ended."""
        with self._errors_kept():
            return started.read()

    def start(self, arrays: Sequence[np.ndarray]) -> StartedStep:
        """Starts the program for arrays of these shapes."""
        with self._errors_kept():
            executable = self._executable(arrays)
            if self.extended.input_checks.is_due(self):
                executable.check_inputs(arrays)
            if self.extended.before_step is not None:
                # Once, and not again when it raises.
                check, self.extended.before_step = self.extended.before_step, None
                check(self, executable.step, arrays)
            return executable(arrays)

    @contextlib.contextmanager
    def _errors_kept(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            # TensorFlow makes a `tf.errors` of it with the same message.
            self.extended.last_error = error
            raise

    def _executable(self, arrays: Sequence[np.ndarray]) -> Executable:
        specs = self.extended.global_specs(arrays)
        if _key(specs) not in self.executables:
            # A shape that was unknown when the graph was traced: the length of this
            # batch, say.
            with self._creation_context():
                self._compile_for(specs, *self.trace(specs))
        return self.executables[_key(specs)]

    @contextlib.contextmanager
    def _creation_context(self) -> Iterator[None]:
        # A thread of TensorFlow's has neither Keras's state nor a strategy.
        strategy = self.extended.strategy
        with use_keras_state(self.keras_state), strategy.scope():
            yield

    def _compile_for(
        self, specs: list[tf.TensorSpec], function: Any, structure: Any
    ) -> None:
        step = lowering.lower(function, structure)
        captures = [self._captured_value(value) for value in step.captures]
        uses = []
        if self.extended.input_checks.steps:
            uses = index_uses(function, captures)
        step = dataclasses.replace(step, captures=captures)
        self.executables[_key(specs)] = Executable(
            self.extended, step, self.name, self.arguments, uses
        )

    def _captured_value(self, value: Any) -> Any:
        """The stand-in for a captured variable or constant while the step runs.

        Raises:
            ValueError: for a variable that was made outside the strategy's scope.
        """
        if not isinstance(value, tf.Variable) or self.extended.owns(value):
            return value
        if value is global_seed_state():
            return BorrowedVariable(value, self.extended.transfer.to_host)
        return owned(value, self.extended.strategy)


class _WeakCall:
    """A call of a step by a graph, which does not keep the step alive.

    TensorFlow keeps Python functions of graphs for the life of the process, and a step
    refers to a model, its state on the devices and the compiled programs.
    """

    def __init__(self, step: Step, method: Callable[[Step, Sequence[np.ndarray]], Any]):
        self.step = weakref.ref(step)
        self.method = method

    def __call__(self, *arrays: np.ndarray) -> Any:
        step = self.step()
        if step is None:
            raise RuntimeError(
                "A graph must keep the steps that it calls. Received: a call of a step "
                "that no longer exists."
            )
        return self.method(step, arrays)


def _keep_with_graph(step: Step) -> None:
    """Keeps `step` for as long as the functions that can run it."""
    graph = tf.compat.v1.get_default_graph()
    while graph is not None and graph.building_function:
        # All of them: the graph of a loop's body dies once it is built.
        graph.gshard_steps = [*getattr(graph, "gshard_steps", []), step]
        graph = graph.outer_graph


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
            "A mesh computes with numbers, and cannot hold others. Turn strings to "
            f"numbers in the input pipeline. Received: {leaf} of dtype {dtype.name}"
        )
