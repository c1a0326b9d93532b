"""Table of the operations and layers of Keras that compile for each platform."""

from typing import Any

import gshard_tf
from benchmarks.harness.command_line import say
from benchmarks.platforms.operations import (
    Case,
    keras_layers_of_table,
    operations_of_table,
)
from gshard_tf.compat.xla_protos import HloModuleProto
from gshard_tf.runtime.device_arrays import Placement
from gshard_tf.runtime.devices import topology_devices
from gshard_tf.spmd import lowering
from gshard_tf.spmd.executable import compile_step
from gshard_tf.spmd.program import jit_step
from gshard_tf.spmd.step_layouts import step_layouts

_ANNOTATIONS = "Sharding", "SPMDFullToShardShape", "SPMDShardToFullShape"


def _failure(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


def _custom_calls(hlo: bytes) -> list[str]:
    module = HloModuleProto.FromString(hlo)
    return sorted(
        {
            instruction.custom_call_target
            for computation in module.computations
            for instruction in computation.instructions
            if instruction.opcode == "custom-call"
        }.difference(_ANNOTATIONS)
    )


class Row:
    """One operation, lowered for the CPU, on its way to the platforms."""

    def __init__(self, strategy: gshard_tf.SpmdStrategy, case: Case):
        fn, specs = case
        self.extended = strategy.extended
        with strategy.scope():

            def step(*tensors: Any) -> Any:
                return self.extended.run_step(fn, tensors, {})

            self.step = lowering.lower(*lowering.trace(step, specs))

    def compiled_for(self, placement: Placement) -> str:
        """Compiles it; returns "ok", or what the compiler says."""
        try:
            compile_step(self.extended.layouts, self.step, placement)
        except Exception as error:  # compilers raise all kinds
            return _failure(error)
        return "ok"

    def exported_for(self, platform: str, mesh: Any) -> str:
        """Makes a program for a platform that this machine need not have.

        jax refuses a call of a function whose stability it does not vouch for.
        """
        import jax

        layouts = step_layouts(self.extended.layouts, self.step)
        with jax.enable_x64(True):
            try:
                jitted, shapes, _ = jit_step(
                    self.step, mesh, layouts, donate=False, platform=platform
                )
                jax.export.export(jitted, platforms=[platform])(*shapes)
            except Exception as error:  # as above
                return _failure(error)
        return "ok"


def table(topology: str, every: int = 1) -> dict[str, Any]:
    """Returns the rows and the counts.

    Args:
        topology: A TPU slice of one core.
        every: Takes one case of so many.
    """
    mesh = gshard_tf.create_mesh({"x": 1})
    strategy = gshard_tf.SpmdStrategy(mesh)
    tpu = Placement(mesh, topology_devices(topology)[:1])
    with strategy.scope():
        cases = {**keras_layers_of_table(), **operations_of_table()}
    rows: dict[str, dict[str, Any]] = {}
    for name, case in list(cases.items())[::every]:
        try:
            row = Row(strategy, case)
        except Exception as error:  # TensorFlow raises all kinds
            rows[name] = {"lowered": _failure(error)}
        else:
            rows[name] = {
                "lowered": "ok",
                "custom_calls": _custom_calls(row.step.hlo),
                "tpu": row.compiled_for(tpu),
                "cuda": row.exported_for("cuda", strategy.extended.placement.jax_mesh),
            }
        say(f"{name}: {rows[name]}")
    lowered = [row for row in rows.values() if row["lowered"] == "ok"]
    return {
        "cases": len(rows),
        "lowered": len(lowered),
        "compiled_for_tpu": sum(row["tpu"] == "ok" for row in lowered),
        "exported_for_cuda": sum(row["cuda"] == "ok" for row in lowered),
        "custom_calls": sorted({c for row in lowered for c in row["custom_calls"]}),
        "table": rows,
    }
