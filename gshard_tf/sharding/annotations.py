"""The paper's annotations (section 3.2): they say how a tensor is laid out.

None of them changes a shape or a value, all of them are differentiable (the gradient
carries the same annotation), and all are the identity where there is nothing to
partition: in eager mode, while Keras infers shapes, and without an active mesh.
Dimensions need not divide by the number of partitions.

A DTensor is laid out already, so there an annotation is `dtensor.relayout`, on the
DTensor's own mesh.
"""

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from tensorflow.experimental import dtensor

from gshard_tf.layouts.partition_spec import join_axes
from gshard_tf.sharding import op_sharding
from gshard_tf.sharding.mesh import ActiveMesh, active_mesh, axis_sizes
from gshard_tf.sharding.mesh_layout import MeshLayout
from gshard_tf.sharding.vectorize import mapped_axes


@tf.autograph.experimental.do_not_convert
def split(tensor: Any, split_dimension: int, num_partitions: int) -> Any:
    """Splits `tensor` along one dimension: partition `i` is on device `i`.

    Args:
        tensor: A tensor of rank 1 or more.
        split_dimension: The dimension, counted from 0, or from the end if negative.
        num_partitions: How many parts, at most the devices of the mesh. Devices
            left over, if any, hold copies, so it must divide their number. For a
            DTensor: the size of one of its mesh's axes, or 1.

    Returns:
        The annotated tensor.

    Raises:
        ValueError: for a dimension that the tensor does not have, or a number of
            partitions that does not fit the mesh.
    """
    rank = _rank(tensor)
    for name, number in (
        ("split_dimension", split_dimension),
        ("num_partitions", num_partitions),
    ):
        if isinstance(number, bool) or not isinstance(number, int | np.integer):
            raise ValueError(
                f"`{name}` must be a whole number. Received: {name}={number!r}"
            )
    if rank is not None and not -rank <= split_dimension < rank:
        raise ValueError(
            f"split_dimension must be in [-{rank}, {rank}) for a tensor of rank "
            f"{rank}. Received: split_dimension={split_dimension}"
        )
    if num_partitions < 1:
        raise ValueError(
            f"num_partitions must be at least 1. Received: {num_partitions}"
        )
    if _is_dtensor(tensor):
        return _split_dtensor(tensor, split_dimension, num_partitions)
    active = partitioning(tensor)
    if active is None:
        return tensor
    _check_not_mapped("split")
    tensor = tf.convert_to_tensor(tensor)
    size = active.mesh.size
    if num_partitions > size or size % num_partitions:
        raise ValueError(
            f"num_partitions must divide the {size} devices of the mesh. "
            f"Received: num_partitions={num_partitions}"
        )
    if rank is None:
        raise ValueError(f"split needs a tensor of known rank. Received: {tensor}")
    tiles = [1] * rank
    tiles[split_dimension] = int(num_partitions)
    if num_partitions == size:
        return op_sharding.constrain(
            tensor, op_sharding.tiled(np.arange(size).reshape(tiles))
        )
    return op_sharding.constrain(tensor, op_sharding.tiled_with_copies(tiles, size))


@tf.autograph.experimental.do_not_convert
def replicate(tensor: Any) -> Any:
    """Keeps a copy of the whole of `tensor` on every device."""
    if _is_dtensor(tensor):
        layout = dtensor.fetch_layout(tensor)
        return dtensor.relayout(
            tensor, dtensor.Layout.replicated(layout.mesh, tensor.shape.rank)
        )
    if partitioning(tensor) is None:
        return tensor
    if mapped_axes():
        return annotate(tensor, (None,) * len(tensor.shape))
    return op_sharding.constrain(tf.convert_to_tensor(tensor), op_sharding.replicated())


@tf.autograph.experimental.do_not_convert
def shard(tensor: Any, layout: dtensor.Layout | Sequence | np.ndarray) -> Any:
    """Lays `tensor` out in the most general way.

    Args:
        tensor: A tensor.
        layout: A `dtensor.Layout` with one spec per dimension; a mesh axis, several
            (a tuple), or None for each dimension, as jax's `PartitionSpec` has them:
            `("data", None, ("x", "y"))`; or, as in the paper, a device assignment: an
            integer array of the tensor's rank whose element is the device of that
            slice. Each device of the mesh stands in it once.
            A tensor `[3, 16, 64]` with an assignment of shape `[1, 2, 4]` has
            partitions of shape `[3, 8, 16]`.

    Returns:
        The annotated tensor. A DTensor is relaid out to `layout`.

    Raises:
        ValueError: when ranks differ, the layout is of another mesh, or the
            assignment does not name each device once.
    """
    rank = _rank(tensor)
    if isinstance(layout, tuple | list) and any(map(_is_spec_entry, layout)):
        return _shard_by_spec(tensor, layout, rank)
    if isinstance(layout, dtensor.Layout):
        if rank is not None and layout.rank != rank:
            raise ValueError(
                f"The layout must have one spec per dimension: {rank}. "
                f"Received: sharding_specs={list(layout.sharding_specs)}"
            )
        if _is_dtensor(tensor):
            return dtensor.relayout(tensor, layout)
        active = partitioning(tensor)
        if active is None:
            return tensor
        _check_not_mapped("shard")
        _check_same_axes(layout.mesh, active.mesh, "The layout")
        return op_sharding.constrain(
            tf.convert_to_tensor(tensor),
            op_sharding.from_layout(MeshLayout.from_dtensor(layout)),
        )

    assignment = np.asarray(layout)
    if assignment.dtype.kind not in "iu":
        raise ValueError(
            "A device assignment must be an array of whole numbers. "
            f"Received: dtype={assignment.dtype}"
        )
    if rank is not None and assignment.ndim != rank:
        raise ValueError(
            f"A device assignment must have the tensor's rank, {rank}. "
            f"Received: shape={assignment.shape}"
        )
    if _is_dtensor(tensor):
        raise ValueError(
            "`layout` must be a dtensor.Layout for a DTensor, whose mesh says which "
            "device is where. Received: a device assignment of shape "
            f"{assignment.shape}"
        )
    active = partitioning(tensor)
    if active is None:
        return tensor
    _check_not_mapped("shard")
    if sorted(assignment.flatten().tolist()) != list(range(active.mesh.size)):
        raise ValueError(
            f"A device assignment must name each of the {active.mesh.size} devices "
            f"of the mesh once. Received: {assignment.tolist()}"
        )
    return op_sharding.constrain(
        tf.convert_to_tensor(tensor), op_sharding.tiled(assignment)
    )


@tf.autograph.experimental.do_not_convert
def annotate(tensor: Any, axes: Sequence[str | None]) -> Any:
    """Lays `tensor` out by name: one logical axis, or None, per dimension.

    The active mesh's rules say which mesh axis each name is split over. This is the
    form for layers, which should not know the mesh.

    Args:
        tensor: A tensor.
        axes: One name or None per dimension. A name without a rule is not split.

    Returns:
        The annotated tensor. A DTensor is relaid out on its own mesh, whose axes
        must be those of the active one.

    Raises:
        ValueError: when the number of names is not the rank, or two names map to
            one mesh axis.
    """
    rank = _rank(tensor)
    if rank is not None and len(axes) != rank:
        raise ValueError(
            f"`axes` must have one name (or None) per dimension: {rank} of them. "
            f"Received: axes={tuple(axes)}"
        )
    if _is_dtensor(tensor):
        return _annotate_dtensor(tensor, axes)
    active = partitioning(tensor)
    if active is None:
        return tensor
    # A tensor of a function that is mapped has those dimensions in front.
    layout = active.rules.layout((*mapped_axes(), *axes), active.mesh)
    return op_sharding.constrain(
        tf.convert_to_tensor(tensor), op_sharding.from_layout(layout)
    )


def name_axes(weight: keras.Variable, axes: Sequence[str | None]) -> keras.Variable:
    """Names the dimensions of a layer's weight; call it in `build`.

    A strategy stores the weight, and the optimizer's slots for it, split as its rules
    say for these names. Without a strategy it changes nothing.

    Returns:
        `weight`.

    Raises:
        ValueError: when the number of names is not the weight's rank.
    """
    if len(axes) != len(weight.shape):
        raise ValueError(
            f"`axes` must have one name (or None) per dimension of {weight.path!r}, "
            f"whose shape is {tuple(weight.shape)}. Received: axes={tuple(axes)}"
        )
    weight.gshard_axes = tuple(axes)
    return weight


def logical_axes(weight: keras.Variable) -> tuple[str | None, ...] | None:
    """Returns the names that `name_axes` recorded for a weight, or None."""
    return getattr(weight, "gshard_axes", None)


def partitioning(tensor: Any) -> ActiveMesh | None:
    """Returns the mesh to annotate a tensor for; None: annotating is the identity."""
    active = active_mesh()
    if active is None or isinstance(tensor, keras.KerasTensor):
        return None
    # An eager tensor stands outside the program that is being partitioned. A variable
    # is read by it.
    if isinstance(tensor, tf.Variable | keras.Variable):
        return None if tf.executing_eagerly() else active
    return active if tf.is_symbolic_tensor(tensor) else None


def _check_not_mapped(name: str) -> None:
    if mapped_axes():
        raise ValueError(
            "A function that is mapped must use `annotate` for its tensors, which have "
            f"another dimension outside of it. Received: a call of gshard_tf.{name}"
        )


def _is_dtensor(tensor: Any) -> bool:
    # The name of the device first: asking DTensor makes its device, for the life of
    # the process.
    return (
        isinstance(tensor, tf.__internal__.EagerTensor)
        and "device:CUSTOM" in tensor.device
        and dtensor.is_dtensor(tensor)
    )


def _shard_by_spec(tensor: Any, spec: Sequence, rank: int | None) -> Any:
    """`shard` by the mesh axis, axes, or None of each dimension."""
    if rank is not None and len(spec) != rank:
        raise ValueError(
            f"A partition spec must have one entry per dimension: {rank}. Received: "
            f"layout={spec}"
        )
    axes = tuple(
        axis if axis is None or isinstance(axis, str) else join_axes(axis)
        for axis in spec
    )
    is_dtensor = _is_dtensor(tensor)
    active = None if is_dtensor else partitioning(tensor)
    if active is None and not is_dtensor:
        return tensor
    mesh = dtensor.fetch_layout(tensor).mesh if active is None else active.mesh
    layout = MeshLayout(axes, mesh)
    if len({*layout.axes}) != len(layout.axes) or not {*layout.axes} <= {
        *mesh.dim_names
    }:
        raise ValueError(
            "A partition spec must name axes of the mesh, "
            f"{list(mesh.dim_names)}, each once. Received: layout={spec}"
        )
    if is_dtensor:
        return dtensor.relayout(tensor, layout.to_dtensor())
    return op_sharding.constrain(
        tf.convert_to_tensor(tensor), op_sharding.from_layout(layout)
    )


def _is_spec_entry(entry: Any) -> bool:
    if isinstance(entry, tuple):
        return any(isinstance(axis, str) for axis in entry)
    return entry is None or isinstance(entry, str)


def _split_dtensor(tensor: tf.Tensor, dimension: int, partitions: int) -> tf.Tensor:
    mesh = dtensor.fetch_layout(tensor).mesh
    specs = [dtensor.UNSHARDED] * tensor.shape.rank
    if partitions > 1:
        fitting = [name for name in mesh.dim_names if mesh.dim_size(name) == partitions]
        if len(fitting) != 1:
            raise ValueError(
                "A DTensor is split over an axis of its mesh, so num_partitions must "
                f"be the size of exactly one axis of {axis_sizes(mesh)}; or use "
                f"shard with a dtensor.Layout. Received: num_partitions={partitions}"
            )
        specs[dimension] = fitting[0]
    return dtensor.relayout(tensor, dtensor.Layout(specs, mesh))


def _annotate_dtensor(tensor: tf.Tensor, axes: Sequence[str | None]) -> tf.Tensor:
    active = active_mesh()
    if active is None:
        return tensor
    mesh = dtensor.fetch_layout(tensor).mesh
    _check_same_axes(mesh, active.mesh, "The DTensor")
    return dtensor.relayout(tensor, active.rules.layout(axes, mesh).to_dtensor())


def _check_same_axes(mesh: dtensor.Mesh, active: dtensor.Mesh, what: str) -> None:
    if list(axis_sizes(mesh).items()) != list(axis_sizes(active).items()):
        raise ValueError(
            f"{what} must be of the mesh that is being partitioned for, "
            f"{axis_sizes(active)}. Received: {axis_sizes(mesh)}"
        )


def _rank(tensor: Any) -> int | None:
    shape = getattr(tensor, "shape", None)
    if shape is None:
        return np.ndim(tensor)
    return shape.rank if isinstance(shape, tf.TensorShape) else len(shape)
