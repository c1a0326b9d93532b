"""HLO modules in jax: calling one from a traced function, and printing one."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

from gshard_tf.compat.shardy import is_shardy_enabled, to_shardy


def call_hlo(
    hlo: bytes,
    arguments: Sequence[Any],
    result_types: Sequence[Any],
    mesh_axes: Mapping[str, int],
) -> Any:
    """Returns the results of a serialized HLO module in a function that jax traces.

    Relies on: `jax.extend.core.Primitive`, `jax.interpreters.mlir` and jaxlib's MLIR
    bindings, with which jax's own `jax2tf.call_tf` merges a foreign module. On an
    upgrade, watch: `jax2tf/call_tf.py`, which still has no public form.

    Args:
        hlo: The module.
        arguments: One traced value per parameter.
        result_types: A `jax.ShapeDtypeStruct` per result.
        mesh_axes: The size of each axis of the mesh whose devices its shardings count.
    """
    import jax

    shapes = [jax.core.ShapedArray(each.shape, each.dtype) for each in result_types]
    return _primitive().bind(
        *arguments,
        hlo=_ByIdentity(hlo),
        out_avals=_ByIdentity(shapes),
        mesh_axes=tuple(mesh_axes.items()),
    )


class _ByIdentity:
    """Makes an unhashable parameter of a primitive hashable."""

    def __init__(self, value: Any):
        self.value = value


@functools.cache
def _primitive() -> Any:
    from jax.extend import core
    from jax.interpreters import mlir
    from jaxlib import _jax
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import func

    primitive = core.Primitive("gshard_step")
    primitive.multiple_results = True

    @primitive.def_abstract_eval
    def _(*_, out_avals, **__):
        return list(out_avals.value)

    def lower(ctx, *args, hlo, out_avals, mesh_axes):
        stablehlo = _jax.mlir.hlo_to_stablehlo(hlo.value)
        module = ir.Module.parse(stablehlo)
        if b"tpu_custom_call" in stablehlo:  # in few; a walk takes its time
            _remove_empty_tilings(module)
        if is_shardy_enabled():
            to_shardy(module, dict(mesh_axes))
        main = ir.SymbolTable(module.operation)["main"]
        result_types = ir.FunctionType(
            ir.TypeAttr(main.attributes["function_type"]).value
        ).results
        name = mlir.merge_mlir_modules(ctx.module_context.module, "gshard_step", module)
        call = func.CallOp(result_types, ir.FlatSymbolRefAttr.get(name), list(args))
        return list(call.results)

    mlir.register_lowering(primitive, lower)
    return primitive


def _remove_empty_tilings(module: Any) -> None:
    """Removes an attribute of kernels that says nothing.

    jaxlib 0.12 gives each call with layouts a list of empty tilings, and cannot write
    the list for a compiler that is older than itself, as libtpu mostly is. On an
    upgrade, see whether a kernel compiles for a TPU without it.
    """
    from jaxlib.mlir import ir

    def visit(operation):
        attributes = operation.attributes
        if "result_tilings" in attributes and all(
            len(ir.ArrayAttr(each)) == 0
            for each in ir.ArrayAttr(attributes["result_tilings"])
        ):
            del attributes["result_tilings"]
        return ir.WalkResult.ADVANCE

    module.operation.walk(visit)


def compiled_as_text(compiled: Any) -> str:
    """Returns the text of a compiled program, as jax's `compiled.as_text()` prints it.

    Relies on: nothing private. jaxlib builds each instruction again to print it, and
    jaxlib 0.10 does not know some that libtpu 0.0.52 makes for chips with SparseCores
    (an `async-update` of several operands). On an upgrade, see that it prints dropless
    experts on a v6e.

    Raises:
        RuntimeError: when jaxlib does not know an instruction.
    """
    import jaxlib

    try:
        return compiled.as_text()
    except RuntimeError as error:  # jaxlib's errors are all of this class
        raise RuntimeError(
            f"jaxlib {jaxlib.__version__} compiled the program, and cannot print it: "
            "the compiler is newer. Install a newer jax and jaxlib. "
            f"Received: {str(error).splitlines()[0]}"
        ) from error


def hlo_as_text(hlo: bytes) -> str:
    """Returns the text of a serialized HLO module.

    Relies on: jaxlib's own printer, in `jaxlib._hlo` since 0.10 and in `_jax` before.
    On an upgrade, watch: the place of `HloPrintOptions` and `HloModule`.
    """
    try:
        from jaxlib import _hlo  # type: ignore[attr-defined]  # it has no stubs
    except ImportError:
        from jaxlib import _jax as _hlo

    options = _hlo.HloPrintOptions()
    options.print_metadata = True  # which operation each instruction stems from
    module = _hlo.HloModule.from_serialized_hlo_module_proto(hlo)
    return module.to_string(options)
