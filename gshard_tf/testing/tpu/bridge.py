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

import numpy as np
import tensorflow as tf
from tensorflow.python import pywrap_mlir
from tensorflow.python.ops import handle_data_util

from gshard_tf.sharding import op_sharding

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
_OPERATION = re.compile(r'^\s+(?:(%\w+)(?::\d+)? = )?"([\w.]+)"\(([^)]*)\)(.*)$')
_REPLICATE = re.compile(r"^\s+(?:(%\d+)(?::\d+)? = )?tf_device\.replicate\((.*)$")
_STRINGS = re.compile(r'"((?:[^"\\]|\\.)*)"')


@dataclasses.dataclass(frozen=True)
class Argument:
    """An argument of the module, and the inputs of the function that it comes from.

    Attributes:
        inputs: `[replicas][cores]`: the number of each core's input of the function.
            One for all cores of a replica where it is no variable, none where it is
            a constant.
        partitions: The number of shards along each dimension of the variable; empty:
            each core has all of it.
        is_variable: Whether the inputs are handles of variables.
        sharding: The serialized `OpSharding` by the bridge; b"": replicated.
        constants: `[replicas]`: the constant of each replica, its number say; () where
            the value comes from the inputs.
    """

    inputs: tuple[tuple[int, ...], ...]
    partitions: tuple[int, ...]
    is_variable: bool
    sharding: bytes
    constants: tuple[int, ...] = ()


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
    host = _Host(text)
    arguments = tuple(
        host.argument(value, sharding, function)
        for value, sharding in zip(
            host.cluster.operands,
            _shardings(host.cluster.rest, "input_sharding_configuration"),
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
        cores=int(_search(r"num_cores_per_replica = (\d+)", host.cluster.rest)[1]),
        arguments=arguments,
        updates=host.updates(),
        outputs=host.outputs(),
        result_shardings=tuple(
            _shardings(host.cluster.rest, "output_sharding_configuration")
        ),
        use_spmd="use_spmd_for_xla_partitioning = true" in host.cluster.rest,
        host_operations=host.host_operations(),
    )


@dataclasses.dataclass(frozen=True)
class _Operation:
    name: str
    operands: tuple[str, ...]
    rest: str
    result: str | None


class _Host:
    """The function around the TPU program, parsed from the bridge's text."""

    def __init__(self, text: str):
        start = text.index("func.func @")
        lines = text[start : text.index("\n  }\n", start)].splitlines()
        self.operations: list[_Operation] = []
        self.replicas = 1
        self.replicated: dict[str, tuple[str, ...]] = {}
        self.replicate_result: str | None = None
        self.yielded: tuple[str, ...] = ()
        self.returned: tuple[str, ...] = ()
        for line in lines:
            match = _OPERATION.match(line)
            if match:
                self.operations.append(
                    _Operation(match[2], _values(match[3]), match[4], match[1])
                )
                continue
            match = _REPLICATE.match(line)
            if match:
                self._replicate(match[1], match[2])
            elif line.strip().startswith("tf_device.return"):
                self.yielded = _values(line.partition("return")[2].partition(" :")[0])
            elif line.strip().startswith("return"):
                self.returned = _values(line.partition("return")[2].partition(" :")[0])
        clusters = [o for o in self.operations if o.name == "tf_device.cluster_func"]
        if len(clusters) != 1:
            raise ValueError(
                "The function must call strategy.run of a TPUStrategy exactly once. "
                f"Received: {len(clusters)} TPU programs"
            )
        [self.cluster] = clusters
        self.by_result = {o.result: o for o in self.operations if o.result}

    def _replicate(self, result: str | None, text: str) -> None:
        self.replicate_result = result
        self.replicas = int(_search(r"\bn = (\d+)", text)[1])
        for values, name in re.findall(r"\[([^\]]*)\] as (%\w+):", text):
            self.replicated[name] = _values(values)
        for value, name in re.findall(r"(%[\w#]+) as (%\w+):", text):
            self.replicated[name] = (value,) * self.replicas

    def _source(self, value: str, replica: int) -> tuple[tuple[int, ...], str]:
        """Returns the inputs that a value comes from, and how they are partitioned."""
        partitioned = ""
        while True:
            if value in self.replicated:
                value = self.replicated[value][replica]
                continue
            operation = self.by_result.get(value.partition("#")[0])
            if operation is None:
                return (int(value.removeprefix("%arg")),), partitioned
            if operation.name == "tf.TPUPartitionedInputV2":
                inputs = [self._source(v, replica)[0][0] for v in operation.operands]
                return tuple(inputs), operation.rest
            value = operation.operands[0]

    def _constants(self, value: str) -> tuple[int, ...]:
        """Returns the constants of the replicas; () for a value that is none."""
        numbers = []
        for each in self.replicated.get(value, ()):
            source = self.by_result.get(each)
            if source is None or source.name != "tf.Const":
                return ()
            numbers.append(source.rest)
        return tuple(
            int(_search(r"dense<(-?\d+)> : tensor<i32>", text)[1]) for text in numbers
        )

    def argument(self, value: str, sharding: bytes, function: Any) -> Argument:
        constants = self._constants(value)
        if constants:
            return Argument(((),) * self.replicas, (), False, sharding, constants)
        sources = [self._source(value, r) for r in range(self.replicas)]
        match = re.search(r"partition_dims = \[([^\]]*)\]", sources[0][1])
        partitions = [int(n) for n in (match[1] if match else "").split(",") if n]
        first = sources[0][0][0]
        order = list(range(len(sources[0][0])))
        if partitions:
            # The operands are in the order of the shards: here, of the cores.
            order = np.argsort(op_sharding.tile_assignment(sharding).ravel()).tolist()
        return Argument(
            inputs=tuple(tuple(inputs[i] for i in order) for inputs, _ in sources),
            partitions=tuple(partitions),
            is_variable=function.graph.inputs[first].dtype == tf.resource,
            sharding=sharding,
        )

    def updates(self) -> tuple[tuple[int, int], ...]:
        handles = [self._handle(value) for value in self.cluster.operands]
        pairs = []
        for operation in self.operations:
            if operation.name == "tf.AssignVariableOp":
                handle, value = operation.operands
                argument = handles.index(self._handle(handle))
                pairs.append((argument, self._result(value)))
        return tuple(pairs)

    def _handle(self, value: str) -> str:
        operation = self.by_result.get(value.partition("#")[0])
        while operation is not None and operation.name == "tf.ReadVariableOp":
            value = operation.operands[0]
            operation = self.by_result.get(value.partition("#")[0])
        return value

    def _result(self, value: str) -> int:
        """Returns the number of the program's result that a value is."""
        name, _, index = value.partition("#")
        while name != self.cluster.result:
            operation = self.by_result[name]
            name, _, index = operation.operands[0].partition("#")
        return int(index or 0)

    def outputs(self) -> tuple[tuple[int, int], ...]:
        outputs = []
        for value in self.returned:
            name, _, index = value.partition("#")
            while name in self.by_result and name != self.cluster.result:
                name, _, index = self.by_result[name].operands[0].partition("#")
            if name == self.replicate_result:
                result, replica = divmod(int(index or 0), self.replicas)
                outputs.append((self._result(self.yielded[result]), replica))
            else:
                outputs.append((int(index or 0), 0))
        return tuple(outputs)

    def host_operations(self) -> tuple[str, ...]:
        usual = {
            "tf.AssignVariableOp", "tf.Const", "tf.Identity", "tf.ReadVariableOp",
            "tf.TPUPartitionedInputV2", "tf_device.cluster_func",
        }  # fmt: skip
        return tuple(o.name for o in self.operations if o.name not in usual)


def _values(text: str) -> tuple[str, ...]:
    return tuple(re.findall(r"%[\w#]+", text))


def _shardings(attributes: str, name: str) -> list[bytes]:
    shardings = _search(name + r" = \[(.*?)\](?=[,}>])", attributes)[1]
    return [unescaped(each) for each in _STRINGS.findall(shardings)]


def _search(pattern: str, text: str) -> re.Match[str]:
    match = re.search(pattern, text)
    if match is None:
        raise ValueError(
            f"The text of the bridge must contain {pattern!r}. Received: {text[:500]!r}"
        )
    return match


def unescaped(text: str) -> bytes:
    """Returns the bytes of a string in MLIR, which has hexadecimal digits for some."""
    result = b""
    for i, token in enumerate(re.split(r"\\([0-9A-Fa-f]{2}|.)", text)):
        if i % 2 == 0:
            result += token.encode("latin-1")
        elif len(token) == 2:
            result += bytes([int(token, 16)])
        else:
            result += {"n": b"\n", "t": b"\t"}.get(token, token.encode())
    return result


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
    end = _search(r"\{\n(?=    )", rest).end()
    casts = "".join(
        f'    %arg{i} = "tf.Cast"(%given{i}) <{{Truncate = false}}> : '
        f"(tensor<{given}>) -> {inner}\n"
        for i, (given, inner) in enumerate(zip(types, declared, strict=True))
    )
    versions = _search(r"tf\.versions = \{[^}]*\}", text)[0]
    return (
        f"module attributes {{{versions}}} {{\n  "
        f"{signature}{arrow}{rest[:end]}{casts}{rest[end:]}"
    )
