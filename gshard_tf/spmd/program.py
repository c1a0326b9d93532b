"""HLO + a mesh -> a compiled, partitioned program.

jaxlib is XLA's runtime on PyPI. Only this file, `runtime/` and `export/` know jax,
and they import it when they are first used: on a TPU VM, importing jax takes the TPU's
lock away from TensorFlow.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
from tensorflow.experimental import dtensor

from gshard_tf.compat.xla import compiler_options, operation_that_failed
from gshard_tf.hlo.rewrites import partition_safely
from gshard_tf.runtime.devices import mesh_devices
from gshard_tf.runtime.process_group import collective_section
from gshard_tf.sharding.regions import assemble, cut
from gshard_tf.spmd.lowering import LoweredStep


@functools.cache
def _step_primitive() -> Any:
    """A jax primitive whose lowering is an HLO module that somebody else made."""
    # Private APIs: merging a foreign module is how jax's own jax2tf.call_tf works,
    # but it has no public form. On an upgrade, compare with jax2tf/call_tf.py.
    from jax.extend import core
    from jax.interpreters import mlir
    from jaxlib import _jax
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import func

    primitive = core.Primitive("gshard_step")
    primitive.multiple_results = True

    @primitive.def_abstract_eval
    def _(*_, hlo, out_avals):
        return list(out_avals.value)

    def lower(ctx, *args, hlo, out_avals):
        stablehlo = _jax.mlir.hlo_to_stablehlo(hlo.value)
        module = ir.Module.parse(stablehlo)
        main = ir.SymbolTable(module.operation)["main"]
        result_types = ir.FunctionType(
            ir.TypeAttr(main.attributes["function_type"]).value
        ).results
        name = mlir.merge_mlir_modules(ctx.module_context.module, "gshard_step", module)
        call = func.CallOp(result_types, ir.FlatSymbolRefAttr.get(name), list(args))
        return list(call.results)

    mlir.register_lowering(primitive, lower)
    return primitive


class _ByIdentity:
    """Makes an unhashable parameter of a primitive hashable."""

    def __init__(self, value: Any):
        self.value = value


def named_sharding(layout: dtensor.Layout, mesh: Any) -> Any:
    """A DTensor layout as jax's `NamedSharding` on `mesh`."""
    from jax.sharding import NamedSharding, PartitionSpec

    specs = [None if s == dtensor.UNSHARDED else s for s in layout.sharding_specs]
    return NamedSharding(mesh, PartitionSpec(*specs))


class Placement:
    """The devices of a mesh, and how values get there and back.

    Args:
        mesh: The mesh.
        devices: Its jax devices in its order, where they are not those of this
            machine: compile-only ones of a topology, say. They are asked for nothing
            but to be compiled for.
    """

    def __init__(self, mesh: dtensor.Mesh, devices: Sequence[Any] | None = None):
        import jax

        self.mesh = mesh
        if devices is None:
            devices = mesh_devices(mesh)
        devices = np.array(devices).reshape(mesh.shape())
        self.jax_mesh = jax.sharding.Mesh(devices, tuple(mesh.dim_names))

    def put(self, value: np.ndarray, layout: dtensor.Layout) -> Any:
        """A copy of `value` on the devices, laid out as `layout` says."""
        import jax

        sharding = named_sharding(layout, self.jax_mesh)
        if not sharding.is_fully_addressable:
            # Every process has the value, and puts its own pieces.
            return assemble(value.shape, sharding, lambda region: cut(value, region))
        with jax.enable_x64(True):
            return jax.device_put(value, sharding, may_alias=False)

    def get(self, value: Any) -> np.ndarray:
        """The whole of a value on the devices, as an array of its own."""
        if not value.is_fully_addressable and not value.is_fully_replicated:
            value = self._gathered(value)
        # A copy: on CPU devices a plain view would share memory with a buffer that
        # the next step is going to reuse.
        return np.array(value, copy=True)

    @functools.cached_property
    def _gather(self) -> Any:
        """Makes every device hold all of a value; all processes take part."""
        import jax
        from jax.sharding import NamedSharding, PartitionSpec

        whole = NamedSharding(self.jax_mesh, PartitionSpec())
        return jax.jit(lambda value: value, out_shardings=whole)

    def _gathered(self, value: Any) -> Any:
        import jax

        with collective_section("reading a split variable"), jax.enable_x64(True):
            return jax.block_until_ready(self._gather(value))


def jit_step(
    step: LoweredStep,
    mesh: Any,
    input_layouts: Sequence[dtensor.Layout],
    output_layouts: Sequence[dtensor.Layout],
    capture_layouts: Sequence[dtensor.Layout],
    use_layouts: Sequence[dtensor.Layout | None] | None = None,
    donate: bool = True,
    keep_finite: bool = False,
) -> tuple[Any, list[Any], tuple[str, ...]]:
    """A step as a function of jax, neither traced nor compiled yet.

    Args:
        step: The lowered step.
        mesh: A `jax.sharding.Mesh`, or an `AbstractMesh` to export it for.
        input_layouts: The layout of each argument.
        output_layouts: The layout of each output.
        capture_layouts: The layout of each captured variable or constant; a new
            value is laid out as the old one.
        use_layouts: The layout that the step uses each of them in, where it is not the
            one that they are stored in; else None.
        donate: Whether the memory of updated variables is reused for their new
            values, so that the old ones are gone.
        keep_finite: Whether a step that makes NaN or infinity of a finite number leaves
            every variable as it is. A last result then says which it would have made
            not finite: one truth value for each of `step.updates`.

    Returns:
        The `jax.jit` function; the `jax.ShapeDtypeStruct`s of its arguments; and what
        was rewritten of it for the partitioner, in sentences. Lower it with 64-bit
        types enabled.
    """
    import jax

    num_inputs = len(step.inputs)
    captures = [named_sharding(x, mesh) for x in capture_layouts]
    # Outputs need a layout too: what XLA would choose by itself may have unequal
    # parts or be no layout of this mesh, and jax takes neither.
    outputs = [named_sharding(x, mesh) for x in output_layouts]
    outputs += [captures[i] for i in step.updates]
    batch_axes = [axis for x in input_layouts for axis in x.sharding_specs[:1]]
    batch_axes = [axis for axis in batch_axes if axis != dtensor.UNSHARDED]
    safe = partition_safely(step.hlo, dict(mesh.shape), batch_axes)
    hlo = _ByIdentity(safe.hlo)
    out_avals = _ByIdentity(
        [jax.core.ShapedArray(s.shape, s.dtype) for s in map(_aval, step.results)]
    )
    used = [None] * len(captures) if use_layouts is None else use_layouts
    used = [None] * num_inputs + [
        None if x is None else named_sharding(x, mesh) for x in used
    ]

    def gshard_step(*args):
        args = [
            arg if sharding is None else jax.lax.with_sharding_constraint(arg, sharding)
            for arg, sharding in zip(args, used, strict=True)
        ]
        results = _step_primitive().bind(*args, hlo=hlo, out_avals=out_avals)
        if keep_finite:
            old = [args[num_inputs + i] for i in step.updates]
            results[step.num_outputs :] = _kept_finite(old, results[step.num_outputs :])
        return results

    if keep_finite:
        from jax.sharding import NamedSharding, PartitionSpec

        outputs.append(NamedSharding(mesh, PartitionSpec()))
    jitted = jax.jit(
        gshard_step,
        in_shardings=[named_sharding(x, mesh) for x in input_layouts] + captures,
        out_shardings=outputs,
        donate_argnums=(tuple(num_inputs + i for i in step.updates) if donate else ()),
        keep_unused=True,
    )
    return jitted, [_aval(spec) for spec in step.inputs + step.captures], safe.notes


def _kept_finite(old: list[Any], new: list[Any]) -> list[Any]:
    """The new values, or all the old ones if any became not finite; and which did."""
    from jax import numpy as jnp

    broken = [
        # What was not finite before (a metric that begins at infinity) may stay so.
        jnp.any(~jnp.isfinite(after) & jnp.isfinite(before))
        if jnp.issubdtype(after.dtype, jnp.inexact)
        else jnp.bool_(False)
        for before, after in zip(old, new, strict=True)
    ]
    broken = jnp.stack(broken) if broken else jnp.zeros([0], bool)
    stays = jnp.any(broken)
    kept = [
        jnp.where(stays, before, after) for before, after in zip(old, new, strict=True)
    ]
    return [*kept, broken]


class SpmdProgram:
    """One compiled step.

    Args:
        step: The lowered step.
        placement: Where it runs.
        input_layouts, output_layouts, capture_layouts, use_layouts, donate,
            keep_finite: See `jit_step`.
    """

    def __init__(
        self,
        step: LoweredStep,
        placement: Placement,
        input_layouts: Sequence[dtensor.Layout],
        output_layouts: Sequence[dtensor.Layout],
        capture_layouts: Sequence[dtensor.Layout],
        use_layouts: Sequence[dtensor.Layout | None] | None = None,
        donate: bool = True,
        keep_finite: bool = False,
    ):
        import jax

        self.step = step
        self.placement = placement
        self.keep_finite = keep_finite
        mesh = placement.jax_mesh
        self.capture_layouts = list(capture_layouts)
        self.input_shardings = [named_sharding(x, mesh) for x in input_layouts]
        with jax.enable_x64(True), warnings.catch_warnings():
            # The module carries GSPMD annotations; jax says on each compilation
            # that it hands them to GSPMD's propagation, which is what we ask for.
            warnings.filterwarnings("ignore", message=".*GSPMD.*")
            jitted, shapes, self.rewrites = jit_step(
                step,
                mesh,
                input_layouts,
                output_layouts,
                capture_layouts,
                use_layouts,
                donate,
                keep_finite,
            )
            options = compiler_options(mesh.devices.flat[0].platform)
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
                    _from_processes(*each)
                    for each in zip(arrays, shapes, self.input_shardings, strict=True)
                ]
        with jax.enable_x64(True):
            return jax.device_put(list(arrays), self.input_shardings)

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


def _raise_with_operation(error: RuntimeError, mesh_shape: dict[str, int]) -> None:
    operation = operation_that_failed(str(error))
    if operation is not None:
        raise ValueError(
            "XLA's partitioner could not split an operation of this model over the "
            f"mesh: an error of the compiler, not of the model. Hold the arguments of "
            "that operation whole with `gshard_tf.replicate`, or lay them out over "
            f"other mesh axes. Received: {operation} on the mesh {mesh_shape}; the "
            f"compiler says {str(error).splitlines()[0]!r}"
        ) from error


def _aval(value: Any) -> Any:
    import jax

    return jax.ShapeDtypeStruct(tuple(value.shape), value.dtype.as_numpy_dtype)


def _from_processes(array: np.ndarray, shape: tuple[int, ...], sharding: Any) -> Any:
    """An argument of `shape` that every process has, or has its rows of."""
    import jax

    if array.shape == shape:
        return assemble(shape, sharding, lambda region: cut(array, region))
    return jax.make_array_from_process_local_data(sharding, array, shape)
