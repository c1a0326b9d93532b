"""Arguments of a traced step that are indices, and the tables they index.

An argument is one where an operation that takes indices (a look-up, a cross-entropy of
labels) gets nothing but what some cheap operations make of arguments and constants.
What those make can be computed on the host, before the step; so it is known for sure
what the operation would get. What it gets from the model itself is not looked at, nor
what is done in a branch or a loop, which may not run.
"""

import dataclasses
import inspect
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from gshard_tf.compat.tf_graphs import called_graph

_CROSS_ENTROPY = "SparseSoftmaxCrossEntropyWithLogits"
# They return what they are given. (XLA's own has no kernel on the host.)
_AS_IT_IS = frozenset(
    "Identity IdentityN StopGradient PreventGradient Snapshot EnsureShape "
    "XlaSharding".split()
)
# What may be computed twice: cheap, and the same each time.
_COMPUTED = frozenset(
    "Cast Reshape Squeeze ExpandDims Transpose StridedSlice Slice ConcatV2 Pack Unpack "
    "Split SplitV Pad PadV2 MirrorPad Tile BroadcastTo Fill Shape Size Rank Range "
    "ZerosLike OnesLike ReverseV2 Roll GatherV2 "
    "Add AddV2 Sub Mul FloorDiv FloorMod Maximum Minimum Neg Abs Sign Floor Round "
    "ClipByValue Less LessEqual Greater GreaterEqual Equal NotEqual LogicalAnd "
    "LogicalOr LogicalNot Select SelectV2 Sum Prod Max Min All Any Cumsum".split()
)
# What `tf.raw_ops` calls an input otherwise than the operation does.
_RENAMED = {
    "dim": "axis",
    "reduction_indices": "axis",
    "split_dim": "axis",
    "t": "x",
    "e": "y",
}
_VARIABLE_READS = ("ReadVariableOp", "Cast", *_AS_IT_IS)
# A longer way than this is no preparation of indices.
_DEEPEST = 100


@dataclasses.dataclass(frozen=True, eq=False)
class _Computed:
    """The computation of an operation, without a reference to its graph.

    Attributes:
        run: Returns the results, given the inputs.
        inputs: A place among the arguments, an array, or a result of another.
        places: Of the arguments that it depends on.
    """

    run: Callable[[Sequence[Any]], Sequence[Any]]
    inputs: tuple["_Source", ...]
    places: frozenset[int]


# With the number of the result.
_Source = int | np.ndarray | tuple[_Computed, int]


@dataclasses.dataclass(frozen=True)
class IndexUse:
    """An operation that takes indices which can be known before the step.

    Attributes:
        where: What takes them, as a sentence begins: a layer and its table, or a loss.
        sizes: How many values an index can have; one number per component.
        places: Of the arguments of the step that they are made of.
        makes_nan: Whether an index out of range makes NaN, as for a cross-entropy, and
            not the value of another index.
    """

    where: str
    sizes: tuple[int, ...]
    places: tuple[int, ...]
    makes_nan: bool
    _source: _Source

    def indices(self, arrays: Sequence[np.ndarray]) -> np.ndarray:
        """`[N, components]`: what the operation would get for these arguments."""
        with tf.device("CPU:0"):
            value = _value(self._source, arrays, {})
        return np.reshape(value, [-1, len(self.sizes)])


def index_uses(function: Any, captures: Sequence[Any]) -> list[IndexUse]:
    """Finds what takes indices in a concrete function of static shapes.

    Args:
        function: Its inputs are the arguments of the step, then the captures.
        captures: What it captured; see `lowering.captured`.
    """
    first = len(function.graph.inputs) - len(captures)
    variables = {first + i: value for i, value in enumerate(captures)}
    reader, uses = _Reader(), []
    for operation, frame in _operations(_Frame(function.graph)):
        tensor, shape = _taken(operation, frame, variables)
        sizes = tuple(size for size in shape if size is not None)
        if tensor is None or len(sizes) < len(shape):
            continue
        source = reader.read(tensor, frame)
        places = _places(source)
        if source is not None and places and not places & variables.keys():
            uses.append(
                IndexUse(
                    _where(operation, frame, variables),
                    sizes,
                    tuple(sorted(places)),
                    operation.type == _CROSS_ENTROPY,
                    source,
                )
            )
    return uses


class _Frame:
    """A graph, and the call that it was entered by; None: it is the step itself."""

    def __init__(
        self,
        graph: Any,
        call: tf.Operation | None = None,
        outer: "_Frame | None" = None,
    ):
        self.graph = graph
        self.call = call
        self.outer = outer
        self.scopes: list[str] = []
        if call is not None and outer is not None:
            self.scopes = [*outer.scopes, *call.name.split("/")]
        self._places = {tensor.name: i for i, tensor in enumerate(graph.inputs)}

    def outside(self, tensor: tf.Tensor) -> "tuple[tf.Tensor, _Frame] | int | None":
        """The caller's tensor for an input, or the input's place among the step's own.

        None for what is no input.
        """
        place = self._places.get(tensor.name)
        if place is None or self.call is None or self.outer is None:
            return place
        return self.call.inputs[place], self.outer


def _operations(frame: _Frame) -> Iterator[tuple[tf.Operation, _Frame]]:
    """The operations that run whenever the step does."""
    todo = [tensor.op for tensor in frame.graph.outputs]
    todo += frame.graph.control_outputs
    seen = set()
    while todo:
        operation = todo.pop()
        if operation.name in seen:
            continue
        seen.add(operation.name)
        yield operation, frame
        inner = called_graph(operation)
        if inner is not None:
            yield from _operations(_Frame(inner, operation, frame))
        todo += [tensor.op for tensor in operation.inputs]
        todo += operation.control_inputs


def _taken(
    operation: tf.Operation, frame: _Frame, variables: dict[int, Any]
) -> tuple[tf.Tensor | None, list[int | None]]:
    """The indices that an operation takes, and the sizes of what they are for."""
    kind, inputs = operation.type, operation.inputs
    if kind == _CROSS_ENTROPY:
        return inputs[1], [inputs[0].shape[-1]]
    if kind == "GatherV2" and inputs[0].shape.rank is not None:
        axis = tf.get_static_value(inputs[2])
        if axis is not None:
            return inputs[1], [inputs[0].shape[int(axis)]]
    if kind == "GatherNd" and inputs[0].shape.rank is not None:
        components = inputs[1].shape[-1]
        if components:
            return inputs[1], list(inputs[0].shape[:components])
    if kind == "ResourceGather":
        table = _variable_behind(inputs[0], frame, variables)
        if table is not None:
            return inputs[1], [table.shape[0]]
    return None, []


def _where(operation: tf.Operation, frame: _Frame, variables: dict[int, Any]) -> str:
    scopes = [*frame.scopes, *operation.name.split("/")[:-1]]
    scope = "/".join(s for s in scopes if s != _CROSS_ENTROPY)
    if operation.type == _CROSS_ENTROPY:
        return f"The cross-entropy {scope!r}" if scope else "A cross-entropy of labels"
    table = _variable_behind(operation.inputs[0], frame, variables)
    path = getattr(table, "path", None)
    of = "" if path is None else f" of {path!r}"
    return f"The look-up{of}" + (f" in {scope!r}" if scope else "")


def _variable_behind(
    tensor: tf.Tensor, frame: _Frame, variables: dict[int, Any]
) -> Any:
    """The variable that a tensor is, if it is only read and cast; else None."""
    while True:
        outside = frame.outside(tensor)
        if isinstance(outside, int):
            return variables.get(outside)
        if outside is not None:
            tensor, frame = outside
        elif tensor.op.type in _VARIABLE_READS:
            tensor = tensor.op.inputs[tensor.value_index]
        else:
            return None


class _Reader:
    """Reads out of graphs how tensors are computed from the arguments of the step."""

    def __init__(self):
        self._computed: dict[tuple, _Computed | None] = {}

    def read(self, tensor: tf.Tensor, frame: _Frame, depth: int = 0) -> _Source | None:
        """Returns the computation of a tensor; None: not one for the host."""
        outside = frame.outside(tensor)
        if isinstance(outside, int):
            return outside
        if depth > _DEEPEST:
            return None
        operation, result = tensor.op, tensor.value_index
        inner = called_graph(operation)
        if outside is None and inner is not None:
            outside = inner.outputs[result], _Frame(inner, operation, frame)
        elif outside is None and operation.type in _AS_IT_IS:
            outside = operation.inputs[result], frame
        if outside is not None:
            return self.read(*outside, depth + 1)
        if operation.type == "Const":
            return tf.get_static_value(tensor)
        if operation.type not in _COMPUTED:
            return None
        key = (*frame.scopes, operation.name)
        if key not in self._computed:
            self._computed[key] = self._compute(operation, frame, depth)
        computed = self._computed[key]
        return None if computed is None else (computed, result)

    def _compute(
        self, operation: tf.Operation, frame: _Frame, depth: int
    ) -> _Computed | None:
        inputs = []
        for tensor in operation.inputs:
            source = self.read(tensor, frame, depth + 1)
            if source is None:
                return None
            inputs.append(source)
        places = frozenset().union(*(_places(source) for source in inputs))
        return _Computed(_runs(operation), tuple(inputs), places)


def _places(source: _Source | None) -> frozenset[int]:
    if isinstance(source, int):
        return frozenset([source])
    return source[0].places if isinstance(source, tuple) else frozenset()


def _value(
    source: _Source, arrays: Sequence[np.ndarray], done: dict[_Computed, Any]
) -> Any:
    if isinstance(source, int):
        return arrays[source]
    if not isinstance(source, tuple):
        return source
    computed, result = source
    if computed not in done:
        inputs = [_value(given, arrays, done) for given in computed.inputs]
        done[computed] = computed.run(inputs)
    return done[computed][result]


def _argument_name(declared: str, accepted: Collection[str]) -> str:
    return declared if declared in accepted else _RENAMED[declared]


def _runs(operation: tf.Operation) -> Callable[[Sequence[Any]], Sequence[Any]]:
    """A function that does what an operation does, at once."""
    make = getattr(tf.raw_ops, operation.type)
    accepted = inspect.signature(make).parameters
    attributes = {
        declared.name: operation.get_attr(declared.name)
        for declared in operation.op_def.attr
        if declared.name in accepted
    }
    # How many inputs an argument has; None: it is no list.
    counts = {
        _argument_name(declared.name, accepted): operation.get_attr(
            declared.number_attr
        )
        if declared.number_attr
        else None
        for declared in operation.op_def.input_arg
    }

    def run(inputs: Sequence[Any]) -> Sequence[Any]:
        values = iter(inputs)
        arguments = {
            name: next(values)
            if count is None
            else [next(values) for _ in range(count)]
            for name, count in counts.items()
        }
        results = make(**arguments, **attributes)
        return [results] if tf.is_tensor(results) else results

    return run
