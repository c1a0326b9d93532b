"""The host's part of a TPU step: the function around the program of the cores.

TensorFlow's bridge prints it as MLIR. Its operations connect the inputs, variables and
outputs of a step with the arguments and results of the module that every core runs.
"""

import dataclasses
import re
from typing import Any

import numpy as np
import tensorflow as tf

from gshard_tf.sharding import op_sharding

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
class _Operation:
    name: str
    operands: tuple[str, ...]
    rest: str
    result: str | None


class HostFunction:
    """The function around the TPU program, parsed from the bridge's text.

    Args:
        text: The text.

    Raises:
        ValueError: when there is not exactly one TPU program.
    """

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
        self.replicas = int(search(r"\bn = (\d+)", text)[1])
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
            int(search(r"dense<(-?\d+)> : tensor<i32>", text)[1]) for text in numbers
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


def shardings(attributes: str, name: str) -> list[bytes]:
    """Returns the shardings of an attribute, by its name, in the text of attributes."""
    listed = search(name + r" = \[(.*?)\](?=[,}>])", attributes)[1]
    return [unescaped(each) for each in _STRINGS.findall(listed)]


def search(pattern: str, text: str) -> re.Match[str]:
    """Returns the match of a pattern, or raises a `ValueError` that names it."""
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
