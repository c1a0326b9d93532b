"""Warnings of operations in a TPU program that XLA's partitioner may get wrong.

`SpmdStrategy` rewrites its modules before the partitioner sees them
(`gshard_tf/hlo/rewrites`). The program of a TPUStrategy is partitioned by TensorFlow's
runtime, which leaves no place for a rewrite. So users get a warning.
"""

import math
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence

import tensorflow as tf

from gshard_tf.compat.tf_graphs import with_called
from gshard_tf.tpu.split_dimensions import SplitDimensions

GROUPED = (
    "the gradient of a grouped or depthwise convolution's kernel may be multiplied by "
    "the size of each mesh axis that does not split its input"
)
SPLIT_IMAGE = (
    "a convolution over an image that is split by height or width, and its gradients, "
    "may be wrong"
)
MAXIMA = (
    "the gradient of max pooling whose windows are larger than its strides is wrong "
    "where the image is split by height or width"
)
SCATTER = (
    "sums over rows that do not divide by the cores (segment sums, scatters, the "
    "gradients of look-ups) may be wrong where these rows are split"
)
FOURIER = "Fourier transforms of a split array may fail"

# The prefix of names of operations that a gradient tape adds.
_GRADIENT = "gradient_tape/"
_FORWARD = ("Conv2D", "Conv3D")
_INPUT_GRADIENT = ("Conv2DBackpropInput", "Conv3DBackpropInputV2")
_KERNEL_GRADIENT = ("Conv2DBackpropFilter", "Conv3DBackpropFilterV2")
_FOURIER = re.compile("I?R?FFT(2D|3D|ND)?")
# The input that holds the indices; whether its last dimension is one index.
_SCATTERS = (
    (re.compile("(Unsorted)?Segment(Max|Mean|Min|Prod|Sum)(V2)?"), 1, False),
    (re.compile("ScatterNd"), 0, True),
    (re.compile("TensorScatter.*|ResourceScatterNd.*"), 1, True),
    (re.compile("ResourceScatter(?!Nd).*"), 1, False),
    (re.compile("(Dense)?Bincount"), 0, False),
)


class PartitionerFaults:
    """Warnings of such layers, each issued once.

    Args:
        mesh_shape: The size of each axis of the mesh of a replica.
    """

    def __init__(self, mesh_shape: Mapping[str, int]):
        self._sizes = [size for size in mesh_shape.values() if size > 1]
        self._warned: set[tuple[str, str]] = set()

    def warn_once(self, operations: Sequence[tf.Operation]) -> None:
        """Warns of the faults of a program that were not warned of yet.

        Args:
            operations: The operations that tracing it has added to the graph.
        """
        faults: dict[str, dict[str, str]] = {}
        for fault, kind, layer in self.find(operations):
            if (fault, layer) not in self._warned:
                self._warned.add((fault, layer))
                faults.setdefault(fault, {})[layer] = kind
        if not faults:
            return
        lines = [f"\n* {_listed(layers)}: {fault}." for fault, layers in faults.items()]
        warnings.warn(
            "XLA's partitioner may get operations of this program wrong, without an "
            "error. SpmdStrategy corrects that; here TensorFlow's runtime partitions "
            f"the program by itself.{''.join(lines)}\nUse gshard_tf.replicate on what "
            "enters such a layer and on what leaves it. gshard_tf.verify cannot run "
            "here: compare a few steps with SpmdStrategy on a CPU mesh of the same "
            "shape. See docs/correctness.md.",
            stacklevel=2,
        )

    def find(
        self, operations: Sequence[tf.Operation]
    ) -> Iterator[tuple[str, str, str]]:
        """Yields the fault, the type and the layer of each such layer of a program."""
        everything = list(with_called(operations))
        faults: dict[str, dict[str, str]] = {}
        split: SplitDimensions | None = None
        for outer, operation in everything:
            fault = _fault_of(operation)
            if fault is None and (_images(operation) or _rows(operation)):
                if split is None:
                    split = SplitDimensions(each for _, each in everything)
                fault = self._fault_where_split(operation, split)
            if fault is not None:
                layer = _layer(outer, fault)
                faults.setdefault(fault, {}).setdefault(layer, operation.type)
        for fault, layers in faults.items():
            for layer in _outermost(layers):
                yield fault, layers[layer], layer

    def _fault_where_split(
        self, operation: tf.Operation, split: SplitDimensions
    ) -> str | None:
        images = _images(operation)
        if images:
            # On a mesh of one axis those without strides and dilation are right.
            if len(self._sizes) == 1 and _is_plain(operation):
                return None
            first = 2 if _channels_first(operation) else 1
            spatial = range(first, first + images[0].shape.rank - 2)
            is_split = any(split.shard_counts(x, d) for x in images for d in spatial)
            return SPLIT_IMAGE if is_split else None
        cores = math.prod(self._sizes)
        for value, shape in _rows(operation):
            # (An unknown number may not divide.)
            uneven = (shape.num_elements() or 1) % cores != 0
            for d, size in enumerate(shape):
                counts = split.shard_counts(value, d)
                uneven = uneven or any(size is None or size % n for n in counts)
            if uneven:
                return SCATTER
        return None


def _fault_of(operation: tf.Operation) -> str | None:
    """Returns the fault of an operation that does not depend on annotations."""
    if operation.type.startswith("DepthwiseConv2dNative"):
        return GROUPED
    images = _images(operation)
    if images:
        kernel = (
            operation.outputs[0]
            if operation.type in _KERNEL_GRADIENT
            else operation.inputs[1]
        )
        image = images[-1] if operation.type in _INPUT_GRADIENT else images[0]
        channels = image.shape[1 if _channels_first(operation) else -1]
        return GROUPED if kernel.shape[-2] not in (None, channels) else None
    if operation.type.startswith("MaxPool") and "Grad" in operation.type:
        return MAXIMA if _overlap(operation) else None
    return FOURIER if _FOURIER.fullmatch(operation.type) else None


def _images(operation: tf.Operation) -> list[tf.Tensor]:
    """Returns the images that a convolution, or a gradient of one, reads and writes."""
    kind, inputs = operation.type, operation.inputs
    if kind in _FORWARD:
        images = [inputs[0], operation.outputs[0]]
    elif kind in _INPUT_GRADIENT:
        images = [inputs[2], operation.outputs[0]]
    elif kind in _KERNEL_GRADIENT:
        images = [inputs[0], inputs[2]]
    else:
        return []
    return images if all(image.shape.rank is not None for image in images) else []


def _channels_first(convolution: tf.Operation) -> bool:
    return convolution.get_attr("data_format").startswith(b"NC")


def _is_plain(convolution: tf.Operation) -> bool:
    return (
        set(convolution.get_attr("strides"))
        == {1}
        == set(convolution.get_attr("dilations"))
    )


def _overlap(pooling: tf.Operation) -> bool:
    if pooling.type.endswith("V2"):
        sizes, strides = (tf.get_static_value(value) for value in pooling.inputs[3:5])
        if sizes is None or strides is None:
            return True
    else:
        sizes, strides = pooling.get_attr("ksize"), pooling.get_attr("strides")
    return any(n > step for n, step in zip(sizes, strides, strict=True))


def _rows(operation: tf.Operation) -> list[tuple[tf.Tensor, tf.TensorShape]]:
    """Returns the indices and the updates of a scatter, and the shape of their rows."""
    for kind, index, is_nd in _SCATTERS:
        if kind.fullmatch(operation.type):
            indices = operation.inputs[index]
            if indices.shape.rank is None:
                return []
            rows = indices.shape[:-1] if is_nd else indices.shape
            updates = [
                value
                for value in operation.inputs
                if value.shape.rank is not None
                and value.shape.rank >= rows.rank > 0
                and value.shape[: rows.rank].is_compatible_with(rows)
            ]
            return [(value, rows) for value in updates]
    return []


def _layer(operation: tf.Operation, fault: str) -> str:
    """Returns the name of an operation's layer, as far as its scope shows it."""
    names = [operation.name]
    if fault == SCATTER:
        # The gradient of a look-up becomes dense where an optimizer reads it. Then the
        # layer is in the names of the values that it sums.
        names += [value.op.name for value in operation.inputs]
    gradients = [name for name in names if name.startswith(_GRADIENT)]
    name = gradients[0] if gradients else names[0]
    return name.removeprefix(_GRADIENT).rpartition("/")[0]


def _outermost(layers: Mapping[str, str]) -> list[str]:
    """Returns layers that are in no other; unnamed ones only if there are no others."""
    named = [layer for layer in layers if layer] or list(layers)
    return [
        layer
        for layer in named
        if not any(layer.startswith(f"{other}/") for other in named if other)
    ]


def _listed(layers: Mapping[str, str]) -> str:
    shown = [
        f"{kind} in {layer!r}" if layer else kind
        for layer, kind in list(layers.items())[:5]
    ]
    more = len(layers) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more else "")
