"""TensorFlow's TPU bridge: from a step under TPUStrategy to the module of one core.

On a TPU the runtime does this when a step first runs. Here it is done without one, to
inspect the program, to compile it for a slice that this machine lacks, or to run it on
virtual CPU devices.

Relies on: MLIR passes by name, and the text between them. On an upgrade, watch
tests/gshard_tf/tpu: they compare the modules' results with plain Keras.
"""

import dataclasses
import re
from typing import Any

import tensorflow as tf
from tensorflow.python import pywrap_mlir
from tensorflow.python.ops import handle_data_util

from gshard_tf.testing.tpu.host_function import (
    Argument,
    HostFunction,
    search,
    shardings,
)

# The first half of the TPU bridge: finds the operations of the TPU, outlines them as a
# function, lifts reads and writes of variables out of it, and records the shardings.
_CLUSTER = "tf-replicated-clustering-bridge-v2"
# The lowering of that function by the runtime's compiler. With the CPU's kernels: those
# of the TPU lower to the same, but only random numbers' are in every wheel.
_LOWER = (
    "tf-shape-inference,func.func(canonicalize),"
    "xla-legalize-tf{use-tf2xla-fallback=true device-type=XLA_CPU_JIT},"
    "func.func(canonicalize),hlo-legalize-to-stablehlo"
)
_TYPES = {
    "bool": "i1", "bfloat16": "bf16", "float16": "f16", "float32": "f32",
    "float64": "f64", "int8": "i8", "int32": "i32", "int64": "i64",
    "uint8": "ui8", "uint32": "ui32", "uint64": "ui64",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class CoreModule:
    """The module that every core runs, before it is partitioned.

    Attributes:
        stablehlo: Its text; no TensorFlow operation is left in it.
        replicas: How many replicas.
        cores: How many cores a replica has.
        arguments: Its arguments.
        updates: `(argument, result)` of each variable's new value.
        outputs: `(result, replica)` of each output of the function.
        result_shardings: The serialized `OpSharding` of each result, by the bridge.
        use_spmd: Whether the runtime is to use XLA's SPMD partitioner.
        host_operations: Operations that stay on the host, except reads and writes.
    """

    stablehlo: str
    replicas: int
    cores: int
    arguments: tuple[Argument, ...]
    updates: tuple[tuple[int, int], ...]
    outputs: tuple[tuple[int, int], ...]
    result_shardings: tuple[bytes, ...]
    use_spmd: bool
    host_operations: tuple[str, ...]


def core_module(function: Any) -> CoreModule:
    """Returns the module of one core for a function that calls `strategy.run` once.

    Args:
        function: A concrete function.

    Raises:
        ValueError: when the function has no TPU program, or several, or one with
            operations that XLA cannot compile.
    """
    text = pywrap_mlir.import_function(function, _CLUSTER, False)
    host = HostFunction(text)
    arguments = tuple(
        host.argument(value, sharding, function)
        for value, sharding in zip(
            host.cluster.operands,
            shardings(host.cluster.rest, "input_sharding_configuration"),
            strict=True,
        )
    )
    types = [_type_of(argument, function) for argument in arguments]
    lowered = pywrap_mlir.experimental_run_pass_pipeline(
        _standalone(text, types), _LOWER, False
    )
    left = set(
        re.findall(
            r'"?(?:tf|mhlo|chlo)\.(?!sharding|aliasing|versions|frontend)\w+', lowered
        )
    )
    if left:
        raise ValueError(
            "The step must have only operations that XLA compiles. Move others into "
            f"the input pipeline or a callback. Received: {sorted(left)}"
        )
    return CoreModule(
        stablehlo=lowered,
        replicas=host.replicas,
        cores=int(search(r"num_cores_per_replica = (\d+)", host.cluster.rest)[1]),
        arguments=arguments,
        updates=host.updates(),
        outputs=host.outputs(),
        result_shardings=tuple(
            shardings(host.cluster.rest, "output_sharding_configuration")
        ),
        use_spmd="use_spmd_for_xla_partitioning = true" in host.cluster.rest,
        host_operations=host.host_operations(),
    )


def _type_of(argument: Argument, function: Any) -> str:
    if argument.constants:
        return "i32"
    tensor = function.graph.inputs[argument.inputs[0][0]]
    if argument.is_variable:
        data = handle_data_util.get_resource_handle_data(tensor).shape_and_type[0]
        dims = [d.size for d in data.shape.dim]
        if argument.partitions:
            dims = [n * p for n, p in zip(dims, argument.partitions, strict=False)]
        dtype = tf.as_dtype(data.dtype)
    else:
        if not tensor.shape.is_fully_defined():
            raise ValueError(
                "A TPU program needs batches of static shape: "
                "dataset.batch(n, drop_remainder=True), and with steps_per_execution "
                f"also .repeat() and steps_per_epoch. Received: {tensor.shape}"
            )
        dims, dtype = tensor.shape.as_list(), tensor.dtype
    return "".join(f"{n}x" for n in dims) + _TYPES[dtype.name]


def _standalone(text: str, types: list[str]) -> str:
    """Returns the program's function as a module of its own, with static shapes.

    The bridge forgets the shapes of variables' values; inside, casts restore the types
    that it declared.
    """
    start = text.index("func.func private @_func")
    signature, arrow, rest = text[start:].partition(") -> ")
    declared = re.findall(r"%arg\d+: (tensor<[^>]*>)", signature)
    signature = re.sub(
        r"%arg(\d+): tensor<[^>]*>",
        lambda match: f"%given{match[1]}: tensor<{types[int(match[1])]}>",
        signature,
    ).replace("func.func private @_func", "func.func @main")
    end = search(r"\{\n(?=    )", rest).end()
    casts = "".join(
        f'    %arg{i} = "tf.Cast"(%given{i}) <{{Truncate = false}}> : '
        f"(tensor<{given}>) -> {inner}\n"
        for i, (given, inner) in enumerate(zip(types, declared, strict=True))
    )
    versions = search(r"tf\.versions = \{[^}]*\}", text)[0]
    return (
        f"module attributes {{{versions}}} {{\n  "
        f"{signature}{arrow}{rest[:end]}{casts}{rest[end:]}"
    )
