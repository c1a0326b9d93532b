"""A function of jax as one operation of TensorFlow.

Relies on: `tf2xla.call_module`, the operation `XlaCallModule` with which jax's own
`jax2tf` puts an exported program into a graph, and jax's switch between the
partitioners GSPMD and Shardy: HLO has forms of its own for manual regions, those that
GSPMD reads. On an upgrade, watch: `jax2tf._run_exported_as_tf`, which calls the same
operation; the versions of the calling convention that TensorFlow takes; and that an
exported `shard_map` still has the forms `SPMDFullToShardShape` and
`SPMDShardToFullShape`, which `gshard_tf.compat.shardy` reads, too.
"""

import dataclasses
import functools
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

# `tf.raw_ops` lacks it.
from tensorflow.compiler.tf2xla.python.xla import (
    call_module,
    call_module_disable_check_platform,
)

from gshard_tf.compat.keras_models import in_symbolic_scope
from gshard_tf.compat.tf_gradients import gradient_scope

# Calls that jax does not promise to read from a file of another version. A step is
# lowered and compiled by one; of a SavedModel the user is told (see `manual`).
_UNPROMISED = ("ragged_all_to_all",)
# The version of StableHLO that modules are written in. jax's own is newer than what an
# older TensorFlow reads (2.21 does not read that of jax 0.12).
_STABLEHLO = "1.10.0"


@dataclasses.dataclass(frozen=True)
class _Program:
    """An exported function: its module, and its results' shapes and structure.

    The module has the arguments `kept`, those that the function reads.
    """

    module: bytes
    kept: tuple[int, ...]
    version: int
    platforms: tuple[str, ...]
    results: tuple[Any, ...]
    structure: Any


# The programs of a function that still exists, by shapes and platform. (jax's own
# `Exported` would keep the function.)
_PROGRAMS: weakref.WeakKeyDictionary[Callable, dict[Any, _Program]] = (
    weakref.WeakKeyDictionary()
)


@tf.autograph.experimental.do_not_convert
def jax_call(
    fn: Callable, *tensors: Any, platform: str | None = None, runs: bool = True
) -> Any:
    """Runs a function of jax on tensors, as one operation with a gradient.

    It works in eager mode, in a `tf.function`, compiled or not, in a Keras layer, in
    the step of a strategy, and in a SavedModel, which holds the program and needs no
    jax. The gradient is `jax.vjp` of the function, a second operation that is made when
    a gradient is asked for, and so can be differentiated again. It computes the
    function anew; in one compiled program XLA merges what both compute, except for
    loops.

    Args:
        fn: A function of arrays that jax can trace. Returns an array, or a nest. It is
            traced once for the same shapes.
        *tensors: Its arguments, of any dtype of jax; those that are not of floating
            point have no gradient. Only the first dimension may be unknown, and is then
            the same number in all tensors where it is.
        platform: The platform whose rules jax lowers the function by, such as `"tpu"`,
            when the program is compiled for other devices than those of this process.
            Defaults to `"cuda"` where TensorFlow has a GPU, else `"cpu"`.
        runs: Whether the operation may run. False, as always while Keras infers shapes:
            only shapes count, and an unknown dimension is one that divides by any
            number up to 16, so that `fn` may split it.

    Returns:
        Tensors in the structure of what `fn` returns.

    Raises:
        ValueError: when another dimension than the first is unknown, or the function
            needs to know an unknown one.
    """
    values = [tf.convert_to_tensor(tensor) for tensor in tensors]
    runs = runs and not in_symbolic_scope()
    return _call(fn, values, _specs(values, runs), platform)


def _call(fn: Callable, tensors: list, specs: list, platform: str | None) -> Any:
    import jax

    program = _program(fn, specs, platform)
    results = program.results
    moving = [i for i, spec in enumerate(specs) if _is_float(spec)]
    moved = [i for i, result in enumerate(results) if _is_float(result)]

    def backward(*arguments: Any) -> Any:
        """Cotangents of the floats among the arguments, by those of the results."""
        inputs, cotangents = arguments[: len(specs)], arguments[len(specs) :]

        def floats(*values):
            whole = list(inputs)
            for i, value in zip(moving, values, strict=True):
                whole[i] = value
            flat = jax.tree.leaves(fn(*whole))
            return [flat[i] for i in moved]

        _, pull = jax.vjp(floats, *(inputs[i] for i in moving))
        return pull(list(cotangents))

    scope = gradient_scope()

    @tf.custom_gradient
    def call(*tensors):
        def gradient(*upstream):
            gradients = [None] * len(tensors)
            if moving and moved:
                wanted = [*tensors, *(upstream[i] for i in moved)]
                shapes = [*specs, *(results[i] for i in moved)]
                # In the layer's scope, as the gradients of other operations are.
                with tf.name_scope(scope):
                    found = _call(backward, wanted, shapes, platform)
                for i, value in zip(moving, found, strict=True):
                    gradients[i] = value
            return gradients

        return _operation(program, tensors, platform), gradient

    return jax.tree.unflatten(program.structure, call(*tensors))


def _operation(program: _Program, tensors: Sequence, platform: str | None) -> list:
    # A step is lowered as for the CPU, whatever it is compiled for.
    disabled = [] if platform is None else [call_module_disable_check_platform()]
    outputs = call_module(
        [tensors[i] for i in program.kept],
        version=program.version,
        module=program.module,
        Tout=[tf.as_dtype(each.dtype) for each in program.results],
        Sout=[_static(each.shape) for each in program.results],
        platforms=[name.upper() for name in program.platforms],
        disabled_checks=disabled,
    )
    return list(outputs)


def _program(fn: Callable, specs: list, platform: str | None) -> _Program:
    if any(None in _static(spec.shape) for spec in specs):
        return _export(fn, specs, platform)  # each trace has symbols of its own
    programs = _PROGRAMS.setdefault(fn, {})
    key = (*((spec.shape, spec.dtype) for spec in specs), platform)
    if key not in programs:
        programs[key] = _export(fn, specs, platform)
    return programs[key]


def _export(fn: Callable, specs: list, platform: str | None) -> _Program:
    import jax
    from jax import export

    # No public switch is for one thread and for a time.
    from jax._src import config
    from jaxlib.mlir.dialects import stablehlo

    if platform is None:
        platform = "cuda" if tf.config.list_physical_devices("GPU") else "cpu"

    # A new function: jax would remember another partitioner's form of the same one.
    @functools.wraps(fn)
    def traced(*arguments):
        return fn(*arguments)

    is_wide = any(spec.dtype.itemsize == 8 for spec in specs)
    with (
        jax.enable_x64(is_wide),
        config.use_shardy_partitioner(False),
        # XLA warns of each stack frame that it does not find in another module.
        config.traceback_in_locations_limit(0),
    ):
        try:
            exported = export.export(
                jax.jit(traced),
                platforms=[platform],
                disabled_checks=[
                    export.DisabledSafetyCheck.custom_call(name) for name in _UNPROMISED
                ],
            )(*specs)
        except _unknown_size_error() as error:
            raise ValueError(
                "A function of jax must not need to know an unknown batch size, as "
                "x.reshape(8, -1) does, and jax.lax.psum over an axis that no rule "
                "splits. Give keras.Input a batch_size, or write it otherwise. "
                f"Received: shapes {[spec.shape for spec in specs]}; "
                f"jax says: {str(error).splitlines()[0]}"
            ) from error
    return _Program(
        stablehlo.serialize_portable_artifact_str(exported.mlir_module(), _STABLEHLO),
        exported.module_kept_var_idx,
        exported.calling_convention_version,
        exported.platforms,
        tuple(jax.ShapeDtypeStruct(a.shape, a.dtype) for a in exported.out_avals),
        exported.out_tree,
    )


def _unknown_size_error() -> type[Exception]:
    """jax's error for a dimension that it needs to know."""
    import jax

    name = "InconclusiveDimensionOperation"  # in jax 0.9 among those of the core
    return getattr(jax.errors, name, None) or getattr(jax.core, name)


def _specs(tensors: Sequence[tf.Tensor], runs: bool) -> list:
    """The shapes of tensors for jax; an unknown first dimension is a symbol."""
    import jax
    from jax import export

    unknown = [
        tensor.shape
        for tensor in tensors
        if tensor.shape.rank is None or None in tensor.shape[1:]
    ]
    if unknown:
        raise ValueError(
            "Tensors of a function of jax must have static shapes, except for the "
            f"first dimension. Received: {[tensor.shape for tensor in tensors]}"
        )
    [batch] = export.symbolic_shape("batch" if runs else "720720*batch")
    return [
        jax.ShapeDtypeStruct(
            [batch if size is None else size for size in tensor.shape],
            tensor.dtype.as_numpy_dtype,
        )
        for tensor in tensors
    ]


def _static(shape: Sequence[Any]) -> list[int | None]:
    return [size if isinstance(size, int) else None for size in shape]


def _is_float(spec: Any) -> bool:
    import jax

    return jax.numpy.issubdtype(spec.dtype, jax.numpy.inexact)
