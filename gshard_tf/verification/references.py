"""Runs of a step: on the mesh, on one device, and in TensorFlow alone."""

import dataclasses
import uuid
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from gshard_tf.runtime.device_arrays import Placement
from gshard_tf.sharding.mesh import create_mesh
from gshard_tf.sharding.mesh_layout import MeshLayout
from gshard_tf.spmd import lowering
from gshard_tf.spmd.program import SpmdProgram
from gshard_tf.spmd.step_layouts import StepLayouts, step_layouts
from gshard_tf.spmd.strategy import SpmdExtended

# From the values of all captures to all results, outputs first.
Run = Callable[[Sequence[np.ndarray]], list[np.ndarray]]


class OnDevices:
    """Compiles a step for some devices and runs it, changing no variable.

    Args:
        step: The step.
        placement: The devices.
        layouts: The layouts of the arguments, results and captures of the step.
        arrays: The arguments of the step.
    """

    def __init__(
        self,
        step: lowering.LoweredStep,
        placement: Placement,
        layouts: StepLayouts,
        arrays: Sequence[np.ndarray],
    ):
        self.placement = placement
        self.layouts = layouts
        self.arrays = arrays
        # A new value has the layout of the old one.
        self.results = [*layouts.outputs, *(layouts.captures[i] for i in step.updates)]

    def compile(self, step: lowering.LoweredStep) -> Run:
        """Returns the step as a function of its captures.

        Args:
            step: The step that the layouts are for; or the same one with more results,
                all of them outputs, which are replicated.
        """
        extra = [
            MeshLayout.replicated(self.placement.mesh, spec.shape.rank)
            for spec in step.results[len(self.results) :]
        ]
        outputs = [*self.results, *extra][: step.num_outputs]
        layouts = dataclasses.replace(self.layouts, outputs=outputs)
        # Other runs use the state again.
        program = SpmdProgram(step, self.placement, layouts, donate=False)

        def run(captures: Sequence[np.ndarray]) -> list[np.ndarray]:
            values = [
                self.placement.put(value, layout)
                for value, layout in zip(captures, layouts.captures, strict=True)
            ]
            outputs, updated = program(program.put_inputs(self.arrays), values)
            return [self.placement.get(value) for value in [*outputs, *updated]]

        return run


def on_mesh(
    extended: SpmdExtended, step: lowering.LoweredStep, arrays: Sequence[np.ndarray]
) -> OnDevices:
    """Returns the step as the strategy runs it."""
    layouts = step_layouts(extended.layouts, step)
    return OnDevices(step, extended.placement, layouts, arrays)


def on_one_device(
    extended: SpmdExtended, step: lowering.LoweredStep, arrays: Sequence[np.ndarray]
) -> OnDevices:
    """Returns the step on the first device of the mesh, which holds everything.

    XLA ignores the annotations of a module with one partition.
    """
    mesh = create_mesh({"one": 1}, extended.mesh.device_type())
    placement = Placement(mesh, [extended.placement.jax_mesh.devices.flat[0]])

    def whole(specs: Sequence[Any]) -> list[MeshLayout]:
        return [MeshLayout.replicated(mesh, spec.shape.rank) for spec in specs]

    layouts = StepLayouts(
        whole(step.inputs),
        whole(step.results[: step.num_outputs]),
        whole(step.captures),
        [None] * len(step.captures),
    )
    return OnDevices(step, placement, layouts, arrays)


def in_tensorflow(
    function: Any,
    step: lowering.LoweredStep,
    arrays: Sequence[np.ndarray],
    jit_compile: bool,
) -> Run:
    """Returns the step as TensorFlow alone runs it on the CPU.

    Args:
        function: The step, traced without a mesh.
        step: The lowered step, which determines captures and results.
        arrays: The arguments.
        jit_compile: Whether TensorFlow compiles it with its own build of XLA, instead
            of running its kernels one by one.
    """
    captured = lowering.captured(function)
    replay = _replay(function, [*step.inputs, *captured], jit_compile)
    place = {id(value): i for i, value in enumerate(step.captures)}

    def run(captures: Sequence[np.ndarray]) -> list[np.ndarray]:
        # Separate resources replace the variables, which must not change.
        handles: dict[int, tf.Tensor] = {}
        with tf.init_scope(), tf.device("/cpu:0"):
            try:
                for value in captured:
                    if isinstance(value, tf.Variable):
                        at = place.get(id(value))
                        old = value.numpy() if at is None else captures[at]
                        handles[id(value)] = _resource(old, value.dtype)
                fed = [handles.get(id(value), value) for value in captured]
                results = replay(*map(tf.constant, arrays), *fed)
                results = [np.array(value) for value in results]
                for i in step.updates:
                    variable = step.captures[i]
                    handle = handles.get(id(variable))
                    new = captures[i]
                    if handle is not None:
                        new = tf.raw_ops.ReadVariableOp(
                            resource=handle, dtype=variable.dtype
                        )
                    results.append(np.array(new))
                return results
            finally:
                for handle in handles.values():
                    tf.raw_ops.DestroyResourceOp(resource=handle)

    return run


def _replay(function: Any, values: Sequence[Any], jit_compile: bool) -> Callable:
    """Returns the graph of a function as a function of arguments and captures.

    Args:
        function: A concrete function.
        values: Specs, tensors or variables for its arguments and captures.
        jit_compile: Whether TensorFlow compiles it.
    """
    graph = function.graph.as_graph_def()
    inputs = [tensor.name for tensor in function.inputs]
    outputs = [tensor.name for tensor in function.outputs]
    # Fed values replace the placeholders. A remaining placeholder does not compile, and
    # one without a user cannot be fed.
    own = {name.partition(":")[0] for name in inputs}
    used = {name.partition(":")[0] for node in graph.node for name in node.input}
    kept = [node for node in graph.node if node.name not in own]
    del graph.node[:]
    graph.node.extend(kept)

    @tf.function(autograph=False, jit_compile=jit_compile)
    def replay(*tensors: tf.Tensor) -> list[tf.Tensor]:
        fed = {
            name: tensor
            for name, tensor in zip(inputs, tensors, strict=True)
            if name.partition(":")[0] in used
        }
        return tf.graph_util.import_graph_def(
            graph, input_map=fed, return_elements=outputs, name="step"
        )

    with tf.init_scope(), tf.device("/cpu:0"):
        # Traced once, for any number of runs.
        return replay.get_concrete_function(
            *[
                tf.TensorSpec([], tf.resource)
                if isinstance(each, tf.Variable)
                else tf.TensorSpec(each.shape, each.dtype)
                for each in values
            ]
        )


def _resource(value: np.ndarray, dtype: tf.DType) -> tf.Tensor:
    """Returns a resource; in a strategy's scope, `tf.Variable` is another class."""
    handle = tf.raw_ops.VarHandleOp(
        dtype=dtype, shape=value.shape, shared_name=f"gshard_verify_{uuid.uuid4().hex}"
    )
    tf.raw_ops.AssignVariableOp(resource=handle, value=tf.constant(value, dtype))
    return handle
