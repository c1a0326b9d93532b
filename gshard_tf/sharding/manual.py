"""Manual regions: a function that each device runs on its own part of the arrays.

The partitioner chooses the communication of everything else. GSPMD (arXiv 2105.04663,
section 3.4) calls the two modes automatic and manual partitioning.
"""

import contextvars
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

from gshard_tf.compat.tf_call_module import jax_call
from gshard_tf.layouts.partition_spec import (
    PartitionSpec,
    as_jax,
    collective_axis,
    parts_over,
)
from gshard_tf.sharding.annotations import partitioning
from gshard_tf.sharding.mesh import ActiveMesh, axis_sizes

Axes = Sequence[str | None]

# An axis of size 1, for names that no mesh axis splits.
_UNSPLIT = "unsplit"
#: What jax calls the platform of a mesh's devices.
PLATFORMS = {"CPU": "cpu", "GPU": "cuda", "TPU": "tpu"}


@dataclasses.dataclass(frozen=True)
class _Region:
    """A manual region.

    Attributes:
        in_axes: The axes of its arguments.
        out_axes: A nest of those of its results.
        active: The mesh whose devices run it, or None: the whole arrays are one part.
    """

    in_axes: Sequence[Axes]
    out_axes: Any
    active: ActiveMesh | None

    @functools.cached_property
    def names(self) -> set[str]:
        """The logical axes that the region names."""
        import jax

        results = jax.tree.leaves(self.out_axes, is_leaf=_is_axes)
        return {name for axes in (*self.in_axes, *results) for name in axes if name}

    def mesh_axis(self, name: str) -> str | None:
        """The mesh axis over which the rules split a logical one, or None."""
        return None if self.active is None else self.active.rules.mesh_axis(name)

    def spec(self, axes: Axes) -> PartitionSpec:
        """The partition spec for some of its axes."""
        if self.active is None:
            return (None,) * len(axes)
        return self.active.rules.layout(axes, self.active.mesh).spec


_REGION: contextvars.ContextVar[_Region] = contextvars.ContextVar("gshard_tf_region")


def manual(fn: Callable, in_axes: Sequence[Axes], out_axes: Any) -> Callable:
    """Returns `fn` as a function of tensors that each device runs on its own part.

    `fn` is a function of jax. It gets a device's part of each array, and communicates
    by `jax.lax.ppermute`, `all_to_all`, `psum` and so on, over `mesh_axis(name)`.
    Nothing else is communicated. It is `jax.shard_map` by logical axes, for any layer.
    `jax.lax.ragged_all_to_all` is for TPUs and GPUs, and not for an axis of size 1; jax
    does not promise that a later version reads a saved program with it.

    Without a mesh, in eager mode and while Keras infers shapes, `fn` gets the whole
    arrays, and each axis has size 1; so it must take the number of devices from
    `jax.lax.axis_size(mesh_axis(name))`, and not from elsewhere.

    Args:
        fn: A function of arrays that jax can trace, which returns an array or a nest.
            It is differentiated by `jax.vjp`; `jax.custom_vjp` is heeded.
        in_axes: The axes of each argument, as `annotate` takes them: one logical
            axis, or None, per dimension. A device gets its part of a dimension whose
            axis the rules split, and all of others.
        out_axes: The axes of the result, or a nest of them as `fn` returns it. A
            result must be equal on all devices along the mesh axes that its axes do
            not split: the gradient relies on it. jax checks it where the rules split
            all axes that the region names.

    Returns:
        A function of tensors. Their dtypes are any of jax; those that are not of
        floating point have no gradient. Shapes must be static, except for the first
        dimension without a mesh.

    Raises:
        ValueError: when `in_axes` does not fit the tensors, or (when it is called) a
            dimension does not divide by the devices that split it; and in the scope of
            `tpu_strategy`.

    Example:

    ```python
    def mean_over_tokens(x):  # a device's [B, L, M] -> [B, M]
        axis = gshard_tf.mesh_axis("length")
        return jax.lax.pmean(x.mean(1), axis)


    mean = gshard_tf.manual(
        mean_over_tokens, [("batch", "length", None)], ("batch", None)
    )
    ```
    """
    for axes in in_axes:
        if not _is_axes(axes):
            raise ValueError(
                "`in_axes` must have, for each argument, one name (or None) per "
                f"dimension. Received: in_axes={in_axes}"
            )

    prepared: dict[Any, Callable] = {}

    def for_arrays(active: ActiveMesh | None) -> Callable:
        # The same function for the same mesh, which is traced once.
        region = _Region(in_axes, out_axes, active)
        key: Any = active
        if active is not None:
            sizes = tuple(axis_sizes(active.mesh).items())
            key = sizes, frozenset(active.rules.rules.items())
        if key not in prepared:
            prepared[key] = _for_arrays(fn, region)
        return prepared[key]

    @tf.autograph.experimental.do_not_convert
    @functools.wraps(fn)
    def call(*tensors: Any) -> Any:
        if len(tensors) != len(in_axes):
            raise ValueError(
                f"The region takes {len(in_axes)} tensors, as `in_axes` says. "
                f"Received: {len(tensors)}"
            )
        _check_strategy()
        values = [tf.convert_to_tensor(tensor) for tensor in tensors]
        for value, axes in zip(values, in_axes, strict=True):
            if value.shape.rank != len(axes):
                raise ValueError(
                    f"A tensor whose axes are {tuple(axes)} must have {len(axes)} "
                    f"dimensions. Received: shape={value.shape}"
                )
        active = next(filter(None, map(partitioning, values)), None)
        if active is None:
            return jax_call(for_arrays(None), *values)
        if not all(value.shape.is_fully_defined() for value in values):
            # A step of unknown shapes is traced for the shapes of its results only, and
            # again for those of each batch.
            return jax_call(for_arrays(None), *values, runs=False)
        region = _Region(in_axes, out_axes, active)
        for value, axes in zip(values, in_axes, strict=True):
            _check_divides(value, axes, region.spec(axes), axis_sizes(active.mesh))
        platform = PLATFORMS[active.mesh.device_type()]
        return jax_call(for_arrays(active), *values, platform=platform)

    return call


def mesh_axis(name: str) -> str | tuple[str, ...]:
    """Returns the axis that collectives in a manual region name for a logical axis.

    Args:
        name: A logical axis, such as `"length"`, that the region's `in_axes` or
            `out_axes` name, or that the rules split.

    Returns:
        The mesh axis over which the rules split it, several as a tuple, which
        collectives of jax take as one; or an axis of size 1.

    Raises:
        ValueError: outside of the function of a manual region, or for another axis.
    """
    region = _REGION.get(None)
    if region is None:
        raise ValueError(
            "mesh_axis must be called in a function that gshard_tf.manual runs. "
            f"Received: mesh_axis({name!r})"
        )
    axis = region.mesh_axis(name)
    if axis is None and name not in region.names:
        raise ValueError(
            f"`name` must be one of the axes of the region, {sorted(region.names)},"
            f" or one that the rules split. Received: mesh_axis({name!r})"
        )
    return collective_axis(axis) or _UNSPLIT


def _for_arrays(fn: Callable, region: _Region) -> Callable:
    """`fn` as a function of whole arrays, of which each device runs its part."""
    import jax
    from jax import sharding

    def part(*arrays):
        token = _REGION.set(region)
        try:
            return fn(*arrays)
        finally:
            _REGION.reset(token)

    def with_unsplit(*arrays):
        one = [array[None] for array in arrays]
        results = jax.vmap(part, axis_name=_UNSPLIT, axis_size=1)(*one)
        return jax.tree.map(lambda result: result[0], results)

    # Collectives over an axis of `vmap` vanish. An axis of the mesh would leave some.
    is_split = None not in map(region.mesh_axis, region.names)
    body = part if is_split else with_unsplit
    if region.active is None:
        return body

    def spec(axes: Axes) -> Any:
        return sharding.PartitionSpec(*as_jax(region.spec(axes)))

    sizes = axis_sizes(region.active.mesh)
    return jax.shard_map(
        body,
        mesh=sharding.AbstractMesh(
            tuple(sizes.values()),
            tuple(sizes),
            # jax 0.12 would ask the arguments for their shardings.
            axis_types=(sharding.AxisType.Auto,) * len(sizes),
        ),
        in_specs=tuple(spec(axes) for axes in region.in_axes),
        out_specs=jax.tree.map(spec, region.out_axes, is_leaf=_is_axes),
        check_vma=is_split,  # the check stops at an axis of `vmap`
    )


def _check_strategy() -> None:
    if isinstance(tf.distribute.get_strategy(), tf.distribute.TPUStrategy):
        # jax would take the TPU from TensorFlow, from the first shape on.
        raise ValueError(
            "A manual region (gshard_tf.manual, and layers that use it: attention with "
            "context_parallel, dropless experts, convolutions of split images) cannot "
            "be in a step of tpu_strategy, which TensorFlow's runtime partitions. Use "
            f"SpmdStrategy. Received: {tf.distribute.get_strategy()}"
        )


def _check_divides(
    tensor: tf.Tensor, axes: Axes, spec: PartitionSpec, sizes: dict[str, int]
) -> None:
    for size, axis in zip(tensor.shape, spec, strict=True):
        parts = parts_over(axis, sizes)
        if size % parts:
            raise ValueError(
                f"A dimension that a manual region splits over {axis!r} must divide "
                f"by its {parts} devices. Received: shape={tensor.shape}, "
                f"axes={tuple(axes)}"
            )


def _is_axes(value: Any) -> bool:
    return isinstance(value, tuple | list) and all(
        each is None or isinstance(each, str) for each in value
    )
