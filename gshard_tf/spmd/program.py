"""HLO + a mesh -> a compiled, partitioned program.

jaxlib is XLA's runtime on PyPI. jax is imported when it is first used: on a TPU VM,
importing it takes the TPU's lock away from TensorFlow.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from gshard_tf.compat.jax_hlo import call_hlo, compiled_as_text, hlo_as_text
from gshard_tf.compat.xla import compiler_options, operation_that_failed
from gshard_tf.hlo import parser
from gshard_tf.hlo.collectives import Collective, collectives
from gshard_tf.hlo.custom_calls import check_portable
from gshard_tf.hlo.rewrites import partition_safely
from gshard_tf.hlo.rewrites.wide_operands import fast_on_cpu
from gshard_tf.layouts.partition_spec import axes_of
from gshard_tf.runtime.device_arrays import Placement, named_sharding
from gshard_tf.spmd.local_batches import assemble_batch
from gshard_tf.spmd.lowering import LoweredStep
from gshard_tf.spmd.nonfinite import kept_finite
from gshard_tf.spmd.step_layouts import StepLayouts


def jit_step(
    step: LoweredStep,
    mesh: Any,
    layouts: StepLayouts,
    donate: bool = True,
    keep_finite: bool = False,
    platform: str | None = None,
) -> tuple[Any, list[Any], tuple[str, ...]]:
    """A step as a function of jax, neither traced nor compiled yet.

    Args:
        step: The lowered step.
        mesh: A `jax.sharding.Mesh`, or an `AbstractMesh` to export it for.
        layouts: The layouts of its arguments, outputs and captures. A new value is laid
            out as the old one.
        donate: Whether the memory of updated variables is reused for their new
            values, so that the old ones are gone.
        keep_finite: Whether a step that makes NaN or infinity of a finite number leaves
            every variable as it is. A last result then says which it would have made
            not finite: one truth value for each of `step.updates`.
        platform: The platform that it is compiled for, "cpu" say. None: more than one.

    Returns:
        The `jax.jit` function; the `jax.ShapeDtypeStruct`s of its arguments; and what
        was rewritten of it for the partitioner, in sentences. Lower it with 64-bit
        types enabled.
    """
    import jax

    num_inputs = len(step.inputs)
    captures = [named_sharding(x, mesh) for x in layouts.captures]
    # Outputs need a layout too: what XLA would choose by itself may have unequal
    # parts or be no layout of this mesh, and jax takes neither.
    outputs = [named_sharding(x, mesh) for x in layouts.outputs]
    outputs += [captures[i] for i in step.updates]
    batch_axes = [
        name for x in layouts.inputs for axis in x.spec[:1] for name in axes_of(axis)
    ]
    if platform not in ("cpu", None):
        check_portable(step.hlo, platform)
    safe = partition_safely(step.hlo, dict(mesh.shape), batch_axes)
    hlo = fast_on_cpu(safe.hlo) if platform == "cpu" else safe.hlo
    result_types = [_aval(spec) for spec in step.results]
    used = [None] * num_inputs + [
        None if x is None else named_sharding(x, mesh) for x in layouts.compute
    ]

    def gshard_step(*arguments):
        args = [
            arg if sharding is None else jax.lax.with_sharding_constraint(arg, sharding)
            for arg, sharding in zip(arguments, used, strict=True)
        ]
        results = call_hlo(hlo, args, result_types, dict(mesh.shape))
        if keep_finite:
            old = [args[num_inputs + i] for i in step.updates]
            results[step.num_outputs :] = kept_finite(old, results[step.num_outputs :])
        return results

    if keep_finite:
        from jax.sharding import NamedSharding, PartitionSpec

        outputs.append(NamedSharding(mesh, PartitionSpec()))
    jitted = jax.jit(
        gshard_step,
        in_shardings=[named_sharding(x, mesh) for x in layouts.inputs] + captures,
        out_shardings=outputs,
        donate_argnums=(tuple(num_inputs + i for i in step.updates) if donate else ()),
        keep_unused=True,
    )
    return jitted, [_aval(spec) for spec in step.inputs + step.captures], safe.notes


class SpmdProgram:
    """One compiled step.

    Args:
        step: The lowered step.
        placement: Where it runs.
        layouts, donate, keep_finite: See `jit_step`.
    """

    def __init__(
        self,
        step: LoweredStep,
        placement: Placement,
        layouts: StepLayouts,
        donate: bool = True,
        keep_finite: bool = False,
    ):
        import jax

        self.step = step
        self.placement = placement
        self.keep_finite = keep_finite
        mesh = placement.jax_mesh
        self.layouts = layouts
        self.input_shardings = [named_sharding(x, mesh) for x in layouts.inputs]
        with jax.enable_x64(True):
            platform = mesh.devices.flat[0].platform
            jitted, shapes, self.rewrites = jit_step(
                step, mesh, layouts, donate, keep_finite, platform
            )
            options = compiler_options(platform)
            lowered = jitted.lower(*shapes)
            try:
                self.compiled = lowered.compile(compiler_options=options)
            except RuntimeError as error:  # jaxlib's errors are all of this class
                _raise_with_operation(error, dict(mesh.shape))
                raise

    def put_inputs(self, arrays: Sequence[np.ndarray]) -> list[Any]:
        """The arguments of a call, on the devices.

        With several processes: all rows of each, or the rows of this process.
        """
        import jax

        if not all(x.is_fully_addressable for x in self.input_shardings):
            shapes = [tuple(spec.shape) for spec in self.step.inputs]
            with jax.enable_x64(True):
                return [
                    assemble_batch(*each)
                    for each in zip(arrays, shapes, self.input_shardings, strict=True)
                ]
        with jax.enable_x64(True):
            return [
                _copied(array, sharding)
                for array, sharding in zip(arrays, self.input_shardings, strict=True)
            ]

    def __call__(
        self, inputs: Sequence[Any], captures: Sequence[Any]
    ) -> tuple[list[Any], list[Any]]:
        """Runs the step on device values; returns outputs and updated values."""
        import jax

        with jax.enable_x64(True):
            results = self.compiled(*inputs, *captures)
        return results[: self.step.num_outputs], results[self.step.num_outputs :]

    def wait(self, values: Sequence[Any]) -> None:
        """Returns when `values` are computed; raises what went wrong with them."""
        import jax

        jax.block_until_ready(list(values))

    def collectives(self) -> list[Collective]:
        """Returns the communication of the compiled program, in program order."""
        loops = parser.parse(hlo_as_text(self.step.hlo)).loops()
        return collectives(compiled_as_text(self.compiled), loops)

    def argument_bytes(self) -> list[tuple[str, int, int]]:
        """Returns path, bytes and bytes per device of each captured variable.

        They are read off the shardings that XLA compiled the program with, not off the
        layouts that were requested.
        """
        shardings = self.compiled.input_shardings[0][len(self.step.inputs) :]
        rows = []
        for value, sharding in zip(self.step.captures, shardings, strict=True):
            shape = tuple(value.shape)
            local = sharding.shard_shape(shape)
            size = value.dtype.size
            name = getattr(value, "path", "constant")
            rows.append((name, math.prod(shape) * size, math.prod(local) * size))
        return rows


def _copied(array: np.ndarray, sharding: Any) -> Any:
    """A copy on the devices, which may not have arrived there yet.

    The array's memory is the caller's, who may use it again before.
    """
    import jax

    return jax.make_array_from_callback(
        array.shape, sharding, lambda index: np.array(array[index])
    )


def _raise_with_operation(error: RuntimeError, mesh_shape: dict[str, int]) -> None:
    operation = operation_that_failed(str(error))
    if operation is not None:
        raise ValueError(
            "XLA's partitioner cannot split an operation of this model over the "
            f"mesh: an error of the compiler, not of the model. Hold the arguments of "
            "that operation whole with `gshard_tf.replicate`, or lay them out over "
            f"other mesh axes. Received: {operation} on the mesh {mesh_shape}; the "
            f"compiler says {str(error).splitlines()[0]!r}"
        ) from error


def _aval(value: Any) -> Any:
    import jax

    return jax.ShapeDtypeStruct(tuple(value.shape), value.dtype.as_numpy_dtype)
