"""Loads and runs a saved program by jax alone, without TensorFlow or Keras."""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from gshard_tf.compat.shardy import shardy_enabled
from gshard_tf.compat.xla import compiler_options
from gshard_tf.export import program_file
from gshard_tf.export.manifest import (
    Manifest,
    Tensor,
    Variant,
    fit_layout,
)
from gshard_tf.layouts.partition_spec import as_jax

State = dict[str, Any]


def load(
    path: str | os.PathLike,
    mesh: int | Mapping[str, int] | None = None,
    devices: Sequence[Any] | None = None,
) -> LoadedProgram:
    """Loads and compiles a program file.

    Args:
        path: The file.
        mesh: The number of devices to use, or axes and sizes. None: as many as the file
            has a program for and the machine has.
        devices: jax devices, such as those of a compile-only topology. None:
            `jax.devices()`.

    Raises:
        ValueError: when the file is broken, or has no program for such a mesh.
        ImportError: when flatbuffers is not installed, which `jax.export` needs and
            jax does not bring.
    """
    import jax

    if importlib.util.find_spec("flatbuffers") is None:
        raise ImportError(
            "Programs are in the format of jax.export, which needs flatbuffers: pip "
            "install flatbuffers, or without a network put its wheel (30 KB of Python) "
            "on PYTHONPATH. Received: no module flatbuffers"
        )

    manifest = program_file.read_manifest(path)
    devices = jax.devices() if devices is None else list(devices)
    variant = choose_variant(manifest, len(devices), mesh)
    programs, constants = program_file.read_programs(path)
    program = programs[variant.start : variant.start + variant.size]
    return LoadedProgram(manifest, variant, program, constants, devices)


def choose_variant(
    manifest: Manifest, devices: int, mesh: int | Mapping[str, int] | None = None
) -> Variant:
    """Returns the variant of a file to load on a machine.

    Args:
        manifest: The manifest of the file.
        devices: The number of devices of the machine.
        mesh: The number to use, or the axes and their sizes. None: as many as
            possible.

    Raises:
        ValueError: when the file has no such program, or there are too few
            devices.
    """
    known = ", ".join(str(v.mesh) for v in manifest.variants)
    fitting = [v for v in manifest.variants if v.devices <= devices]
    if isinstance(mesh, Mapping):
        choices = [v for v in manifest.variants if v.mesh == dict(mesh)]
    elif mesh is not None:
        choices = [v for v in manifest.variants if v.devices == mesh]
    else:
        choices = sorted(fitting, key=lambda v: -v.devices)
    if not choices:
        raise ValueError(
            f"The mesh must be one that the file has a program for. It has "
            f"programs for the meshes {known}. Save it again with "
            f"meshes=[...]. Received: mesh={mesh}, {devices} device(s)"
        )
    if choices[0] not in fitting:
        raise ValueError(
            f"The mesh {choices[0].mesh} needs {choices[0].devices} devices. "
            f"Smaller ones in this file: {[v.mesh for v in fitting]}. "
            f"Received: {devices} device(s)"
        )
    return choices[0]


class LoadedProgram:
    """A step on the devices of this machine; created by `load`.

    ```python
    program = export.load("train.gshard")
    arrays, _ = export.read_state("state.npz")
    state = program.put_state(arrays)
    for batch in batches:
        outputs, state = program(batch, state)
    ```

    Attributes:
        manifest: The manifest of the file.
        mesh: Axis -> size of the devices in use.
        device_kind: The name that jax has for such a device.
        compiled: jax's compiled program: `as_text()`, `memory_analysis()` ...
    """

    def __init__(
        self,
        manifest: Manifest,
        variant: Variant,
        program: bytes,
        constants: Mapping[str, np.ndarray],
        devices: Sequence[Any],
    ):
        import jax
        from jax import export

        self.manifest = manifest
        self.mesh = dict(variant.mesh)
        self.device_kind: str = devices[0].device_kind
        grid = np.array(devices[: variant.devices]).reshape(list(self.mesh.values()))
        jax_mesh = jax.sharding.Mesh(grid, tuple(self.mesh))

        def shardings(tensors: Sequence[Tensor]) -> list[Any]:
            return [
                jax.sharding.NamedSharding(
                    jax_mesh,
                    jax.sharding.PartitionSpec(*as_jax(fit_layout(t, self.mesh))),
                )
                for t in tensors
            ]

        self._inputs = shardings(manifest.inputs)
        captures = shardings(manifest.state)
        self._state = {
            tensor.name: sharding
            for tensor, sharding in zip(manifest.state, captures, strict=True)
        }
        outputs = shardings(manifest.outputs) + [captures[i] for i in manifest.updates]
        with _x64(), shardy_enabled():
            jitted = jax.jit(
                export.deserialize(bytearray(program)).call,
                in_shardings=self._inputs + captures,
                out_shardings=outputs,
                donate_argnums=tuple(
                    len(manifest.inputs) + i for i in manifest.updates
                ),
                keep_unused=True,
            )
            shapes = [
                jax.ShapeDtypeStruct(t.shape, np.dtype(t.dtype))
                for t in [*manifest.inputs, *manifest.state]
            ]
            options = compiler_options(devices[0].platform)
            self.compiled = jitted.lower(*shapes).compile(compiler_options=options)
        self._constants = self._put(constants) if constants else {}

    def put_state(self, arrays: Mapping[str, Any]) -> State:
        """Returns the state on the devices, in the layouts of the program.

        Args:
            arrays: Arrays by name. Those that the program does not use are unchanged.

        Raises:
            ValueError: when an array is missing or does not fit.
        """
        for tensor in self.manifest.state:
            if tensor.role == "constant":
                continue
            array = arrays.get(tensor.name)
            fits = array is not None and (array.shape, array.dtype) == (
                tensor.shape,
                np.dtype(tensor.dtype),
            )
            if not fits:
                received = "nothing" if array is None else f"{array.dtype}{array.shape}"
                raise ValueError(
                    f"The program's state has {tensor.name!r}, which must be "
                    f"{tensor.dtype}{tensor.shape}. Received: {received}"
                )
        used = {name: arrays[name] for name in self._state if name in arrays}
        return {**arrays, **self._put(used)}

    def reset_metrics(self, state: State) -> State:
        """Returns the state with metrics at zero, as at the begin of an epoch."""
        zeros = {
            tensor.name: np.zeros(tensor.shape, tensor.dtype)
            for tensor in self.manifest.state
            if tensor.role == "metric"
        }
        return {**state, **self._put(zeros)}

    def _put(self, arrays: Mapping[str, Any]) -> State:
        import jax

        names = list(arrays)
        with _x64():
            # No alias, because the memory is reused for new values.
            values = jax.device_put(
                [arrays[name] for name in names],
                [self._state[name] for name in names],
                may_alias=False,
            )
        return dict(zip(names, values, strict=True))

    def put_batch(self, batch: Sequence[Any]) -> list[Any]:
        """Returns a batch on the devices; `__call__` also does this."""
        import jax

        with _x64():
            return jax.device_put(list(batch), self._inputs)

    def __call__(
        self, batch: Sequence[np.ndarray], state: State
    ) -> tuple[dict[str, Any], State]:
        """Runs a step.

        Args:
            batch: The arrays of a batch in the order of `manifest.inputs`.
            state: From `put_state` or an earlier call. The entries that the step
                updates are invalid afterwards.

        Returns:
            Outputs by name, and the new state; both may still be computed.
        """
        manifest = self.manifest
        inputs = self.put_batch(batch)
        with _x64():
            values = [
                self._constants[t.name] if t.role == "constant" else state[t.name]
                for t in manifest.state
            ]
            results = self.compiled(*inputs, *values)
        names = [tensor.name for tensor in manifest.outputs]
        updated = [manifest.state[i].name for i in manifest.updates]
        outputs = dict(zip(names, results[: len(names)], strict=True))
        return outputs, {
            **state,
            **dict(zip(updated, results[len(names) :], strict=True)),
        }


@contextlib.contextmanager
def _x64() -> Iterator[None]:
    """Enables 64-bit types, which Keras's counters have."""
    import jax

    if hasattr(jax, "enable_x64"):
        with jax.enable_x64(True):
            yield
    else:
        # The name in earlier versions of jax than the one that types are checked with.
        from jax.experimental import enable_x64  # type: ignore[attr-defined]

        with enable_x64():
            yield
