"""Propagation of annotations to the dimensions of a graph's tensors.

XLA lays tensors out from the annotations on, along dimensions that operations keep. As
far as TensorFlow's graph shows them, they are followed here, forwards and backwards.
"""

import collections
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from gshard_tf.compat.tf_graphs import called_graphs
from gshard_tf.sharding.op_sharding import tile_dimensions

# A dimension of a tensor.
Dimension = tuple[tf.Tensor, int]

# Dimensions stay what they are, and may change their sizes.
_RESIZING = frozenset(
    {
        "AvgPool", "AvgPool3D", "BatchToSpaceND", "ConcatV2", "Conv2D", "Conv3D",
        "DepthwiseConv2dNative", "MaxPool", "MaxPool3D", "MirrorPad", "Pad", "PadV2",
        "ResizeBilinear", "ResizeNearestNeighbor", "Slice", "SpaceToBatchND",
        "StridedSlice",
    }
)  # fmt: skip
_KERNEL_SECOND = ("Conv2D", "Conv3D", "DepthwiseConv2dNative")
# Products, and the attribute that says that the first matrix is transposed.
_PRODUCTS = {
    "BatchMatMul": "adj_x",
    "BatchMatMulV2": "adj_x",
    "BatchMatMulV3": "adj_x",
    "MatMul": "transpose_a",
}
_RESHAPING = ("ExpandDims", "Reshape", "Squeeze")


class SplitDimensions:
    """Numbers of shards into which annotations may split each dimension.

    Args:
        operations: The operations of a step, including those of its functions.
    """

    def __init__(self, operations: Iterable[tf.Operation]):
        neighbors = collections.defaultdict(list)
        todo: list[tuple[Any, int, int]] = []
        for operation in operations:
            for (a, i), (b, j) in _links(operation):
                neighbors[a.ref(), i].append((b.ref(), j))
                neighbors[b.ref(), j].append((a.ref(), i))
            if operation.type == "XlaSharding":
                [value] = operation.outputs
                for dimension, count in enumerate(_annotated_counts(operation)):
                    todo.append((value.ref(), dimension, count))
        self._counts: dict[tuple[Any, int], set[int]] = collections.defaultdict(set)
        while todo:
            ref, dimension, count = todo.pop()
            if count not in self._counts[ref, dimension]:
                self._counts[ref, dimension].add(count)
                todo += [(*each, count) for each in neighbors[ref, dimension]]

    def shard_counts(self, tensor: tf.Tensor, dimension: int) -> set[int]:
        """Returns the numbers of shards, above 1, that a dimension may have."""
        return {n for n in self._counts.get((tensor.ref(), dimension), ()) if n > 1}


def _annotated_counts(annotation: tf.Operation) -> Sequence[int]:
    # (After the dimensions of the tensor may come the number of copies.)
    dimensions = tile_dimensions(annotation.get_attr("_XlaSharding"))
    return dimensions[: annotation.outputs[0].shape.rank]


def _links(operation: tf.Operation) -> Iterator[tuple[Dimension, Dimension]]:
    """Yields the pairs of dimensions of inputs and outputs that are the same."""
    kind, inputs, outputs = operation.type, operation.inputs, operation.outputs
    called = called_graphs(operation)
    for graph in called:
        # (A branch lacks the condition, and a loop's condition has other outputs.)
        given = inputs[len(inputs) - len(graph.inputs) :]
        for outer, inner in [
            *zip(given, graph.inputs, strict=False),
            *zip(outputs, graph.outputs, strict=False),
        ]:
            yield from _same(outer, inner)
    if called or not inputs or not outputs or outputs[0].shape.rank is None:
        return
    first, result = inputs[0], outputs[0]
    if kind == "Einsum":
        equation = operation.get_attr("equation").decode()
        given, _, letters = equation.partition("->")
        for value, names in zip(inputs, given.split(","), strict=True):
            for i, name in enumerate(() if "..." in equation else names):
                if name in letters:
                    yield (value, i), (result, letters.index(name))
    elif kind == "Transpose":
        order = tf.get_static_value(inputs[1])
        for i, source in enumerate(() if order is None else order):
            yield (first, int(source)), (result, i)
    elif kind in _RESHAPING:
        for i, j in _regrouped(first.shape, result.shape):
            yield (first, i), (result, j)
    elif kind in _PRODUCTS:
        if not operation.get_attr(_PRODUCTS[kind]):
            yield from itertools.islice(_same(first, result), result.shape.rank - 1)
    elif kind.endswith(("BackpropInput", "BackpropInputV2")):
        yield from _same(inputs[2], result)
    elif "BackpropFilter" in kind or "Gather" in kind or "Scatter" in kind:
        return
    else:
        those = inputs[:1] if kind in _KERNEL_SECOND else inputs
        for (i, value), (o, result) in itertools.product(
            enumerate(those), enumerate(outputs)
        ):
            if kind != "IdentityN" or i == o:
                yield from _same(value, result, kind not in _RESIZING)


def _same(
    a: tf.Tensor, b: tf.Tensor, of_one_size: bool = False
) -> Iterator[tuple[Dimension, Dimension]]:
    """Yields each dimension of one with that of the other, if they have as many."""
    if a.shape.rank is None or a.shape.rank != b.shape.rank:
        return
    for d, (m, n) in enumerate(zip(a.shape, b.shape, strict=True)):
        if m == n or not of_one_size:
            yield (a, d), (b, d)


def _regrouped(before: tf.TensorShape, after: tf.TensorShape) -> list[tuple[int, int]]:
    """Returns the dimensions at which equal groups of elements begin in both."""
    if not (before.is_fully_defined() and after.is_fully_defined()):
        return []
    # Each dimension, by the product of the sizes of those before it.
    starts = [
        {
            int(np.prod(shape[:d])): d
            for d in reversed(range(shape.rank))
            if shape[d] != 1
        }
        for shape in (before, after)
    ]
    return [(starts[0][n], starts[1][n]) for n in starts[0] if n in starts[1]]
