"""One function that Keras runs as a step, and its programs, one per set of shapes."""

import contextlib
import dataclasses
import json
import weakref
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from tensorflow.experimental import dtensor

from gshard_tf.compat.keras_seeds import global_seed_state
from gshard_tf.compat.keras_threads import keras_state, use_keras_state
from gshard_tf.runtime.process_group import (
    all_gather_text,
    collective_section,
    group,
)
from gshard_tf.sharding.mesh import without_mesh
from gshard_tf.sharding.sharded_variable import PlacedVariable
from gshard_tf.sharding.variable_layouts import Layouts
from gshard_tf.spmd import lowering
from gshard_tf.spmd.borrowed_variable import BorrowedVariable
from gshard_tf.spmd.index_uses import IndexUse, index_uses
from gshard_tf.spmd.input_checks import argument_names, check_indices
from gshard_tf.spmd.program import Placement, SpmdProgram
from gshard_tf.spmd.variable import MeshVariable

# Stands for a tensor among the arguments of a step.
_ARGUMENT = lowering.LEAF
# What a step captures and may change; the rest are constants.
_VARIABLES = (MeshVariable, BorrowedVariable)


class NonFiniteError(FloatingPointError, ValueError):
    """NaN or infinity in a step; TensorFlow reports it as `InvalidArgumentError`."""


class Step:
    """One function that Keras runs, and its programs, one per set of shapes.

    Args:
        extended: The `SpmdExtended` of the strategy that runs it.
        fn: The function.
        arguments: What it is called with, `(args, kwargs)`.

    Raises:
        ValueError: when an argument is no dense tensor of numbers.
    """

    def __init__(self, extended: Any, fn: Callable, arguments: Any):
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
        return self._trace(self.fn, specs)

    def trace_alone(self, arrays: Sequence[np.ndarray], jit_compile: bool) -> Any:
        """The step for `arrays`, traced without a mesh, for compiling or not."""
        specs = self.extended.global_specs(arrays)
        with self._where_it_was_made():
            return self._trace(without_mesh(self.fn), specs, jit_compile)[0]

    def _trace(
        self, fn: Callable, specs: list[tf.TensorSpec], jit_compile: bool = True
    ) -> tuple[Any, Any]:
        def step(*tensors):
            values = iter(tensors)
            args, kwargs = tf.nest.map_structure(
                lambda leaf: next(values) if leaf is _ARGUMENT else leaf, self.arguments
            )
            return self.extended.call_fn(fn, args, kwargs)

        return lowering.trace(step, specs, jit_compile)

    def emit(self) -> Any:
        """Puts a call of the program into the graph that is being traced."""
        specs = self.extended.global_specs(self.tensors)
        function, structure = self.trace(specs)
        # With what the trace made: Keras's global seed generator, say.
        self.keras_state = keras_state()
        for value in lowering.captured(function):
            self._resident(value)
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
            executable = self._executable(arrays)
            if self.extended.input_checks.is_due(self):
                executable.check_inputs(arrays)
            if self.extended.before_step is not None:
                # Once, and not again when it raises.
                check, self.extended.before_step = self.extended.before_step, None
                check(self, executable.step, arrays)
            return executable(arrays)
        except Exception as error:
            # TensorFlow makes a `tf.errors` of it with the same message.
            self.extended.last_error = error
            raise

    def _executable(self, arrays: Sequence[np.ndarray]) -> "_Executable":
        specs = self.extended.global_specs(arrays)
        if _key(specs) not in self.executables:
            # A shape that was unknown when the graph was traced: the length of this
            # batch, say.
            with self._where_it_was_made():
                self._add(specs, *self.trace(specs))
        return self.executables[_key(specs)]

    @contextlib.contextmanager
    def _where_it_was_made(self) -> Iterator[None]:
        # A thread of TensorFlow's has neither Keras's state nor a strategy.
        strategy = self.extended._container_strategy()
        with use_keras_state(self.keras_state), strategy.scope():
            yield

    def _add(self, specs: list[tf.TensorSpec], function: Any, structure: Any) -> None:
        step = lowering.lower(function, structure)
        captures = [self._resident(value) for value in step.captures]
        uses = []
        if self.extended.input_checks.steps:
            uses = index_uses(function, captures)
        step = dataclasses.replace(step, captures=captures)
        self.executables[_key(specs)] = _Executable(
            self.extended, step, self.name, self.arguments, uses
        )

    def _resident(self, value: Any) -> Any:
        """What stands for a captured variable or constant while the step runs.

        Raises:
            ValueError: for a variable that was made outside the strategy's scope.
        """
        if not isinstance(value, tf.Variable) or self.extended.is_ours(value):
            return value
        if value is global_seed_state():
            return BorrowedVariable(value, self.extended.residence.to_host)
        return self.extended.ours(value)


class _Call:
    """What a graph calls for a step, without keeping it alive.

    TensorFlow keeps Python functions of graphs for the life of the process, and a step
    has a hold of a model, its state on the devices and the compiled programs.
    """

    def __init__(self, step: Step):
        self.step = weakref.ref(step)

    def __call__(self, *arrays: np.ndarray) -> list[np.ndarray]:
        return self.step().run(arrays)


def _keep_with_graph(step: Step) -> None:
    """Keeps `step` for as long as the functions that can run it."""
    graph = tf.compat.v1.get_default_graph()
    while graph is not None and graph.building_function:
        # All of them: the graph of a loop's body dies once it is built.
        graph._gshard_steps = [*getattr(graph, "_gshard_steps", []), step]
        graph = graph.outer_graph


@dataclasses.dataclass(frozen=True)
class SkippedStep:
    """A step that changed nothing, since it would have made NaN or infinity.

    Attributes:
        number: Which call of the step it was, from 1.
        arrays: Its arguments, flat.
        arguments: Their structure, with `lowering.LEAF` for each.
        broken: The variables that would not have been finite.
    """

    number: int
    arrays: list[np.ndarray]
    arguments: Any
    broken: list[MeshVariable]

    def call_arguments(self) -> tuple[tuple, dict]:
        """What the step was called with, `(args, kwargs)`."""
        values = iter(self.arrays)
        return tf.nest.map_structure(
            lambda leaf: next(values) if leaf is _ARGUMENT else leaf, self.arguments
        )


class _Executable:
    """A program and the variables that it runs on; compiled when first called."""

    def __init__(
        self,
        extended: Any,
        step: lowering.LoweredStep,
        name: str,
        arguments: Any,
        uses: list[IndexUse],
    ):
        self.extended = extended
        self.step = step
        self.name = name
        self.arguments = arguments
        self.uses = uses
        self.program: SpmdProgram | None = None
        self.constants: dict[int, Any] = {}

    def __call__(self, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
        extended, step = self.extended, self.step
        with extended.residence.lock:
            if self.program is None or self.program.keep_finite != extended.keep_finite:
                self._compile()
            program, layouts = self.program, self.program.capture_layouts
            extended.steps_run[self.name] += 1
            if extended.check_numerics:
                self._check_finite(arrays, lambda i: f"argument {i}")
            captures = [
                value.take_device_value(
                    lambda array, layout=layout: extended.placement.put(array, layout)
                )
                if isinstance(value, _VARIABLES)
                else self.constants[i]
                for i, (value, layout) in enumerate(
                    zip(step.captures, layouts, strict=True)
                )
            ]
            inputs = program.put_inputs(arrays)
            count = extended.steps_run[self.name]
            with collective_section(f"step {count} of {self.name}"):
                outputs, updated = program(inputs, captures)
                # Until all devices are done, they may read the arguments' memory.
                program.wait([*updated, *outputs])
            if program.keep_finite:
                *updated, broken = updated
            if extended.check_numerics:
                self._check_finite(outputs, lambda i: f"result {i}")
                self._check_finite(
                    updated,
                    lambda i: (
                        f"the new value of {step.captures[step.updates[i]].path!r}"
                    ),
                )
            # At once: the old values are gone, their memory is reused.
            for i, value in zip(step.updates, updated, strict=True):
                step.captures[i].set_device_value(value)
            if program.keep_finite and np.any(broken):
                self._note_skipped(np.asarray(broken), arrays)
            return [np.asarray(output) for output in outputs]

    def check_inputs(self, arrays: Sequence[np.ndarray]) -> None:
        """Raises `InputRangeError` for an id or a label that is out of range."""
        extended = self.extended
        check_indices(
            # A guard that finds NaN is told what to do about it.
            [use for use in self.uses if not (use.makes_nan and extended.keep_finite)],
            arrays,
            argument_names(self.name, self.arguments),
            extended.row_share,
        )

    def _note_skipped(self, broken: np.ndarray, arrays: Sequence[np.ndarray]) -> None:
        step, extended = self.step, self.extended
        broken_variables = [
            step.captures[i] for i, bad in zip(step.updates, broken, strict=True) if bad
        ]
        extended.skipped_steps.append(
            SkippedStep(
                extended.steps_run[self.name],
                # Copies: the arguments' memory is TensorFlow's.
                [np.array(array) for array in arrays],
                self.arguments,
                broken_variables,
            )
        )

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
        extended = self.extended
        if group().count > 1:
            check_processes_agree(self.step, self.name)
        self.program = compile_step(
            extended,
            self.step,
            extended.placement,
            donate=not extended.check_numerics,
            keep_finite=extended.keep_finite,
        )
        extended.layouts.warn_once()
        self.constants = {
            i: extended.placement.put(value.numpy(), layout)
            for i, (value, layout) in enumerate(
                zip(self.step.captures, self.program.capture_layouts, strict=True)
            )
            if not isinstance(value, _VARIABLES)
        }
        extended.programs.append(weakref.ref(self.program))


@dataclasses.dataclass(frozen=True)
class StepLayouts:
    """How everything that enters and leaves a step is laid out.

    Attributes:
        inputs: Of each argument.
        outputs: Of each output.
        captures: Of each captured variable or constant, as it is stored.
        uses: As the step uses it, where that differs; else None.
    """

    inputs: list[dtensor.Layout]
    outputs: list[dtensor.Layout]
    captures: list[dtensor.Layout]
    uses: list[dtensor.Layout | None]


def check_processes_agree(step: lowering.LoweredStep, name: str) -> None:
    """Compares what the processes of a run are about to run, and on which values.

    Raises:
        ValueError: in all of them, when it is not the same.
    """
    mine = {"shapes": [str(spec) for spec in step.inputs], "values": {}}
    for i, value in enumerate(step.captures):
        path = f"{i} {getattr(value, 'path', 'constant')}"
        if not isinstance(value, MeshVariable) or value.device_value is None:
            mine["values"][path] = zlib.crc32(np.ascontiguousarray(value.numpy()))
    said = [json.loads(text) for text in all_gather_text("step", json.dumps(mine))]
    for i, theirs in enumerate(said):
        if theirs["shapes"] != said[0]["shapes"]:
            raise ValueError(
                f"The processes do not run the same {name}: process 0 has batches "
                f"{said[0]['shapes']}. Received: process {i} has {theirs['shapes']}"
            )
        ours, others = said[0]["values"], theirs["values"]
        differing = [
            path for path in {**ours, **others} if ours.get(path) != others.get(path)
        ]
        if differing:
            raise ValueError(
                "The processes began with other values; call "
                "keras.utils.set_random_seed in all of them before the model is made, "
                f"and restore the same checkpoint. Received: process {i} differs from "
                f"process 0 in {len(differing)} variables: {differing[:5]}"
            )


def step_layouts(layouts: Layouts, step: lowering.LoweredStep) -> StepLayouts:
    """The layouts that the rules of a strategy give to a step."""
    captures, uses = [], []
    for value in step.captures:
        if isinstance(value, PlacedVariable):
            decision = layouts.of(value)
            captures.append(decision.layout)
            uses.append(decision.use)
        else:
            captures.append(dtensor.Layout.replicated(layouts.mesh, value.shape.rank))
            uses.append(None)
    outputs = [spec.shape for spec in step.results[: step.num_outputs]]
    return StepLayouts(
        [layouts.of_batch(spec.shape) for spec in step.inputs],
        [
            # Every process is given all of what comes out.
            dtensor.Layout.replicated(layouts.mesh, shape.rank)
            if group().count > 1
            else layouts.of_batch(shape)
            for shape in outputs
        ],
        captures,
        uses,
    )


def compile_step(
    extended: Any,
    step: lowering.LoweredStep,
    placement: Placement,
    donate: bool = True,
    keep_finite: bool = False,
) -> SpmdProgram:
    """Compiles a step with the layouts of its strategy, for the devices of `placement`.

    They need not be the strategy's own, nor exist.
    """
    found = step_layouts(extended.layouts, step)
    return SpmdProgram(
        step,
        placement,
        found.inputs,
        found.outputs,
        found.captures,
        found.uses,
        donate=donate,
        keep_finite=keep_finite,
    )


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
