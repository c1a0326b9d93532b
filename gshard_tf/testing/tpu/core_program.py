"""The module of a TPU core, partitioned and compiled: for CPU devices, or a TPU."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from gshard_tf.runtime.devices import cpu_devices
from gshard_tf.sharding import op_sharding
from gshard_tf.testing.tpu.bridge import CoreModule
from gshard_tf.testing.tpu.host_function import Argument


class CoreProgram:
    """One module on R x N devices, as a TPU's runtime would run it.

    Args:
        module: The module.
        devices: jax devices, replica by replica: compile-only ones of a TPU topology,
            say. None: CPU devices of this process, on which it can be run.
    """

    def __init__(self, module: CoreModule, devices: Sequence[Any] | None = None):
        # Relies on: jax's compiler below its public face, which compiles only jax's own
        # modules, for one replica. On an upgrade, compare with jax/_src/compiler.py.
        from jax._src.interpreters import mlir
        from jaxlib import xla_client
        from jaxlib.mlir import ir

        count = module.replicas * module.cores
        runs = devices is None
        devices = list(cpu_devices(count) if devices is None else devices[:count])
        options = xla_client.CompileOptions()
        options.num_replicas = module.replicas
        options.num_partitions = module.cores
        build = options.executable_build_options
        build.num_replicas = module.replicas
        build.num_partitions = module.cores
        build.use_spmd_partitioning = module.use_spmd
        build.use_shardy_partitioner = False
        ids = np.array([d.id for d in devices]).reshape(module.replicas, module.cores)
        build.device_assignment = options.device_assignment = (
            xla_client.DeviceAssignment.create(ids)
        )
        text = _as_newer_mlir(module.stablehlo)
        text = text.replace("module attributes", "module @step attributes")
        # jaxlib runs several replicas, but cannot express that their results are split:
        # so they are gathered, and cut here.
        self._gathered = runs and module.replicas > 1
        if self._gathered:
            text = _with_whole_results(text)
        with mlir.make_ir_context() as context:
            context.allow_unregistered_dialects = True
            parsed = ir.Module.parse(text)
        client = devices[0].client
        compile_ = client.compile_and_load if runs else client.compile
        self.module = module
        self.devices = devices
        self.executable = compile_(
            parsed, xla_client.DeviceList(tuple(devices)), options
        )

    def as_text(self) -> str:
        """The partitioned module, for `gshard_tf.hlo.collectives`."""
        return self.executable.hlo_modules()[0].to_string()

    @property
    def memory(self) -> Any:
        """The compiler's account of the memory that each core needs."""
        return self.executable.get_compiled_memory_stats()

    def __call__(
        self, value_of: Callable[[int], np.ndarray]
    ) -> tuple[list[np.ndarray], list[list[np.ndarray]]]:
        """Runs it.

        Args:
            value_of: Returns the value of an input of the function: for a variable's
                handle, the shard of that core; for another input, all of it.

        Returns:
            The outputs of the function, and for each of the module's `updates` the new
            value on each device, replica by replica.
        """
        results = self.executable.execute_sharded(
            [self._put(argument, value_of) for argument in self.module.arguments]
        ).disassemble_into_single_device_arrays()
        cores = self.module.cores
        outputs = [
            np.array(results[result][replica * cores])
            for result, replica in self.module.outputs
        ]
        updates = [
            self._shards(result, [np.array(each) for each in results[result]])
            for _, result in self.module.updates
        ]
        return outputs, updates

    def _shards(self, result: int, values: list[np.ndarray]) -> list[np.ndarray]:
        """Returns the shard of a result that each device keeps."""
        if not self._gathered:
            return values
        cores = self.module.cores
        sharding = self.module.result_shardings[result]
        return [
            _cut(value, sharding, cores)[i % cores] for i, value in enumerate(values)
        ]

    def _put(self, argument: Argument, value_of: Callable[[int], np.ndarray]) -> Any:
        import jax
        from jax.sharding import Mesh, NamedSharding, PartitionSpec

        shards: list[Any] = []
        for replica, inputs in enumerate(argument.inputs):
            values = [np.asarray(value_of(i)) for i in inputs]
            if argument.constants:
                number = np.int32(argument.constants[replica])
                shards += [number] * self.module.cores
            elif not argument.is_variable:
                shards += _cut(values[0], argument.sharding, self.module.cores)
            else:
                shards += values
        # The executable reads the array of each device alone. To jax, the shards are
        # rows of one long array.
        mesh = Mesh(np.array(self.devices), ("core",))
        shape, spec = shards[0].shape, PartitionSpec()
        if shape:
            shape = (shape[0] * len(shards), *shape[1:])
            spec = PartitionSpec("core")
        with jax.enable_x64(True):
            arrays = [
                # The program reuses the memory of its updated arguments.
                jax.device_put(shard, device, may_alias=False)
                for shard, device in zip(shards, self.devices, strict=True)
            ]
            return jax.make_array_from_single_device_arrays(
                shape, NamedSharding(mesh, spec), arrays
            )


def _as_newer_mlir(text: str) -> str:
    """Unpacks booleans: TensorFlow's MLIR has eight in a byte, jaxlib's one."""

    def unpacked(match: re.Match) -> str:
        packed = np.frombuffer(bytes.fromhex(match[1]), np.uint8)
        count = math.prod(int(n) for n in match[2].split("x") if n)
        bits = np.unpackbits(packed, count=count, bitorder="little")
        return f'dense<"0x{bits.tobytes().hex().upper()}"> : tensor<{match[2]}i1>'

    return re.sub(r'dense<"0x([0-9A-F]+)"> : tensor<([\dx]*)i1>', unpacked, text)


def _with_whole_results(text: str) -> str:
    start = text.index("func.func @main")
    head, arrow, rest = text[start:].partition(") -> ")
    head = re.sub(r",? ?tf\.aliasing_output = \d+ : i64", "", head)
    results, newline, body = rest.partition("\n")
    results = re.sub(r'mhlo\.sharding = "[^"]*"', 'mhlo.sharding = ""', results)
    return text[:start] + head + arrow + results + newline + body


def _cut(value: np.ndarray, sharding: bytes, cores: int) -> list[np.ndarray]:
    """Returns the shard of a value that the host sends to each core of a replica."""
    tiles = op_sharding.tile_dimensions(sharding)
    if not tiles:  # each core has all of it
        return [value] * cores
    shards: list[Any] = [None] * cores
    for place, core in np.ndenumerate(op_sharding.tile_assignment(sharding)):
        index = []
        # (After the dimensions of the value may come the number of copies.)
        for i, n, size in zip(place, tiles, value.shape, strict=False):
            step = size // n
            index.append(slice(i * step, (i + 1) * step))
        shards[core] = value[tuple(index)]
    return shards
