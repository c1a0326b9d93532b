"""A TensorFlow step -> one HLO module, with its state among the parameters.

The step is traced as it is, with the variables that it captures. XLA's own aliasing
table then says which result is the new value of which variable, so nothing has to
be rewritten or made stateless.
"""

import dataclasses
import numbers
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from gshard_tf.compat.tf_compiler import lower_to_hlo
from gshard_tf.compat.tf_graphs import hidden_from_outer_graphs
from gshard_tf.compat.xla_protos import hlo_pb2, xla_data_pb2
from gshard_tf.hlo.rewrites.recomputed_maxima import compute_compared_maxima_once
from gshard_tf.hlo.rewrites.recomputed_rounding import compute_rounding_once
from gshard_tf.spmd.stateful_random import warn_of_stateful_random
from gshard_tf.spmd.variable import raw_handles, variable_of, with_host_shapes


@dataclasses.dataclass
class LoweredStep:
    """One step as HLO.

    Attributes:
        hlo: Serialized `HloModuleProto`. Parameters: `inputs`, then `captures`.
            Results: `num_outputs` outputs, then one new value per item of `updates`.
        inputs: The specs of the arguments.
        captures: For each captured parameter, the variable or the constant tensor.
        results: The specs of the results.
        num_outputs: How many of them are outputs.
        updates: Index into `captures` of each new value, in order.
        structure: The result of the step, with each output replaced by `LEAF`;
            anything but a tensor is kept as it was returned.
    """

    hlo: bytes
    inputs: list[tf.TensorSpec]
    captures: list[Any]
    results: list[tf.TensorSpec]
    num_outputs: int
    updates: list[int]
    structure: Any


class _Leaf:
    def __repr__(self) -> str:
        return "<output>"


LEAF = _Leaf()


def trace(
    fn: Callable[..., Any], specs: Sequence[tf.TensorSpec], jit_compile: bool = True
) -> tuple[Any, Any]:
    """Traces `fn(*tensors)`.

    Args:
        fn: The step.
        specs: The specs of its arguments.
        jit_compile: Whether to trace it for a compiler, as `lower` needs it.

    Returns:
        The concrete function, whose outputs are the tensors and variables that `fn`
        returns, flat; and the structure that `fn` returns, with each of those replaced
        by `LEAF`. What else it holds (None, Python's and numpy's numbers, strings) is
        no result of the program and stays as it is.
    """
    structure = None

    def step(*tensors):
        nonlocal structure
        outputs = fn(*tensors)
        flat = tf.nest.flatten(outputs)
        for leaf in flat:
            if isinstance(leaf, tf.__internal__.CompositeTensor) and not isinstance(
                leaf, tf.Variable
            ):
                raise TypeError(
                    "A step on a mesh must return dense tensors; ragged and sparse "
                    f"ones have no static shape. Received: {leaf}"
                )
        structure = tf.nest.pack_sequence_as(
            outputs, [LEAF if _is_result(leaf) else leaf for leaf in flat]
        )
        return [tf.convert_to_tensor(leaf) for leaf in flat if _is_result(leaf)]

    # A graph around it holds only a call of the step's program: it neither reads nor
    # writes the variables, and taking it for a reader would bring the whole state to
    # the host after every step.
    with raw_handles(), hidden_from_outer_graphs():
        function = tf.function(
            step, jit_compile=jit_compile, autograph=False
        ).get_concrete_function(*specs)
    return function, structure


def _is_result(leaf: Any) -> bool:
    return tf.is_tensor(leaf) or isinstance(leaf, tf.Variable | keras.Variable)


def as_results(outputs: Any) -> Any:
    """A nest in which variables, Python's and numpy's numbers are tensors.

    For a program that runs without the function that returned them.
    """
    kinds = tf.Variable | keras.Variable | numbers.Number | np.generic | np.ndarray
    return tf.nest.map_structure(
        lambda leaf: tf.convert_to_tensor(leaf) if isinstance(leaf, kinds) else leaf,
        outputs,
    )


def pack(structure: Any, outputs: Sequence[Any]) -> Any:
    """Puts `outputs` where `structure` has leaves."""
    values = iter(outputs)
    return tf.nest.map_structure(
        lambda leaf: next(values) if leaf is LEAF else leaf, structure
    )


def captured(function: Any) -> list[Any]:
    """The variable, or else the tensor, behind each captured input of a function."""
    variables = {}
    with raw_handles():
        for variable in function.graph.variables:
            variables[id(variable.handle)] = variable
    values = []
    for tensor in function.captured_inputs:
        if tensor.dtype != tf.resource:
            if not isinstance(tensor, tf.__internal__.EagerTensor):
                raise ValueError(
                    "The step cannot use a tensor of the function around it, which is "
                    "not in its program. Pass it as an argument of `strategy.run`. "
                    f"Received: {tensor}"
                )
            values.append(tensor)
        elif id(tensor) in variables:
            values.append(variables[id(tensor)])
        elif (variable := variable_of(tensor)) is not None:
            values.append(variable)
        else:
            raise ValueError(
                "The step uses a resource that is no variable (a lookup table, an "
                "iterator or a summary writer, say), which XLA cannot compile. Move it "
                f"into the tf.data pipeline or a callback. Received: {tensor}"
            )
    return values


def lower(function: Any, structure: Any) -> LoweredStep:
    """Lowers a concrete function of static shapes to HLO."""
    captures = captured(function)
    inputs = [
        tf.TensorSpec(spec.shape, spec.dtype)
        for spec in tf.nest.flatten(function.structured_input_signature)
    ]
    try:
        with with_host_shapes(captures):
            hlo = lower_to_hlo(function)
    except ValueError as error:
        raise ValueError(
            "The step uses an operation that XLA cannot compile, on strings or a "
            "Python function, say. Move it into the input pipeline or a callback. "
            f"Received: {error}"
        ) from error
    proto = hlo_pb2.HloModuleProto.FromString(hlo)
    _check_static(proto)
    warn_of_stateful_random(proto)
    changes = [
        _without_copies(proto),
        compute_compared_maxima_once(proto),
        compute_rounding_once(proto),
    ]
    if any(changes):
        hlo = proto.SerializeToString()
    # A lone result is no tuple, so it has no index.
    result_of = {
        (entry.output_shape_index or [0])[0]: entry.parameter_number
        for entry in proto.input_output_alias.entries
    }
    result = proto.host_program_shape.result
    shapes = (
        result.tuple_shapes if result.element_type == xla_data_pb2.TUPLE else [result]
    )
    num_results = len(shapes)
    num_outputs = num_results - len(result_of)
    updates = [
        result_of.get(i, -1) - len(inputs) for i in range(num_outputs, num_results)
    ]
    if num_outputs != len(function.outputs) or any(
        not 0 <= i < len(captures) for i in updates
    ):
        raise RuntimeError(
            "A module's results must be the outputs, then the new values of captured "
            "variables. Install the tested TensorFlow (see setup.py). "
            f"Received: {num_results} results for {len(function.outputs)} outputs, "
            f"aliases {result_of}"
        )
    dtypes = [output.dtype for output in function.outputs]
    dtypes += [captures[i].dtype for i in updates]
    results = [
        tf.TensorSpec(tuple(shape.dimensions), dtype)
        for shape, dtype in zip(shapes, dtypes, strict=True)
    ]
    return LoweredStep(hlo, inputs, captures, results, num_outputs, updates, structure)


def _without_copies(proto: hlo_pb2.HloModuleProto) -> bool:
    """Turns copies into conversions to the same type; whether there were any.

    TensorFlow's bridge copies a variable that is returned as it is. StableHLO has no
    copy, and the TPU compiler takes StableHLO only.
    """
    is_changed = False
    for computation in proto.computations:
        for instruction in computation.instructions:
            if instruction.opcode == "copy":
                instruction.opcode = "convert"
                is_changed = True
    return is_changed


def _check_static(proto: hlo_pb2.HloModuleProto) -> None:
    for computation in proto.computations:
        for instruction in computation.instructions:
            if any(instruction.shape.is_dynamic_dimension):
                raise ValueError(
                    "The step cannot have a tensor whose shape depends on values, as "
                    "tf.boolean_mask, tf.where(condition) or tf.unique make it: a "
                    "partitioned program has none. Multiply by the mask instead, or "
                    "do it in the input pipeline. Received: "
                    f"{instruction.metadata.op_type or instruction.opcode} "
                    f"{instruction.metadata.op_name!r}"
                )
