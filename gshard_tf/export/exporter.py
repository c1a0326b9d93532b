"""Exports a Keras step to a file: traced for each mesh, serialized by jax.

This side needs TensorFlow; `loader.py` does not.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from tensorflow.experimental import dtensor

from gshard_tf.checkpoints.training_state import training_state
from gshard_tf.compat.keras_seeds import global_seed_state
from gshard_tf.compat.keras_variables import backend_variable
from gshard_tf.compat.keras_versions import check_is_keras_3
from gshard_tf.export import program_file
from gshard_tf.export.manifest import (
    PLATFORMS,
    Manifest,
    Tensor,
    Variant,
    fit_layout,
)
from gshard_tf.io.paths import local_path
from gshard_tf.layouts.partition_spec import PartitionSpec
from gshard_tf.sharding.mesh import axis_sizes, create_mesh, use_mesh
from gshard_tf.sharding.mesh_layout import MeshLayout
from gshard_tf.spmd import lowering
from gshard_tf.spmd.abstract import is_abstract, lower_abstract
from gshard_tf.spmd.base import MeshExtended, owned
from gshard_tf.spmd.keras_step import (
    MODES,
    batch_specs,
    check_mode,
    complete,
    variable_roles,
)
from gshard_tf.spmd.leaf_names import batch_arrays, named_leaves
from gshard_tf.spmd.program import jit_step
from gshard_tf.spmd.step_layouts import StepLayouts, step_layouts


def step_program(
    model: keras.Model, mode: str = "train", batch: Any = None
) -> StepProgram:
    """Returns a step of a model as a program that runs without TensorFlow.

    ```python
    export.save_state(model, "run/state.npz")
    program = export.step_program(model, "train", batch=(x[:64], y[:64]))
    program.save("run/train.gshard", initial_state="state.npz")
    ```

    and, where only jax is installed, `python -m gshard_tf.export.runner`.

    Args:
        model: A model made in the scope of an `SpmdStrategy`; or of an
            `AbstractStrategy`, for a model larger than this machine's memory. It must
            be compiled unless it only predicts. Its variables are created as the first
            step of `fit` would create them.
        mode: "train", "evaluate" or "predict".
        batch: What `fit` passes to a step: `(x, y)` or `(x, y, sample_weight)`, or `x`
            alone, each a nest of arrays, `tf.TensorSpec` or `keras.KerasTensor`. The
            *global* batch; a program is for one shape.

    Returns:
        A `StepProgram`, to be saved; nothing is compiled.

    Raises:
        ValueError: for an unknown mode, a batch without static shapes, a model that is
            not compiled, or one that does not belong to such a strategy.
        TypeError: for a model of Keras 2.
    """
    return StepProgram(model, mode, batch)


class StepProgram:
    """A step of a model that can be saved. Made by `step_program`.

    Args:
        model, mode, batch: See `step_program`.
    """

    def __init__(self, model: keras.Model, mode: str, batch: Any):
        check_mode(mode)
        check_is_keras_3(model, "`step_program`")
        strategy = model.distribute_strategy
        if not isinstance(strategy.extended, MeshExtended):
            raise ValueError(
                "`model` must be made, and compiled, inside `with strategy.scope():` "
                f"of an SpmdStrategy. Received: {model.name!r} of a "
                f"{type(strategy).__name__}"
            )
        self.strategy = strategy
        self.model = model
        self.mode = mode
        self.specs = batch_specs(batch)
        with strategy.scope():
            complete(model, self.specs, mode)
        for variable in training_state(model).values():
            owned(variable, strategy)
        if not is_abstract(model):
            _check_metrics(model)

    def save(
        self,
        path: str | os.PathLike,
        meshes: Iterable[int | Mapping[str, int]] | None = None,
        initial_state: str | None = None,
        platforms: Sequence[str] = PLATFORMS,
    ) -> Manifest:
        """Writes the step to a file that needs jax alone to run.

        The step is traced and lowered once for each mesh, and nothing is compiled, so
        the meshes need no devices.

        Args:
            path: The file, `train.gshard` say, on a local or mounted disk.
            meshes: The meshes that it can be loaded on: axes and sizes, or a number of
                devices for a mesh of one axis. None: the strategy's own and all that
                halving its axes leads to, down to one device.
            initial_state: The name of a state file (`save_state`) in the same folder,
                from which the runner starts.
            platforms: The platforms that it can be loaded on, of `PLATFORMS`.

        Returns:
            The manifest of the file.

        Raises:
            ValueError: when `path` is remote, a mesh has other axes than the
                strategy's, or the step uses variables that neither the model nor its
                optimizer holds.
        """
        path = local_path(path)  # before minutes of tracing
        own = self.strategy.extended.mesh
        axes = [_axes(own, mesh) for mesh in meshes or halvings(own)]
        if axis_sizes(own) not in axes:
            axes = [axis_sizes(own), *axes]
        manifests: list[Manifest] = []
        programs: list[bytes] = []
        variants: list[Variant] = []
        constants: dict[str, np.ndarray] = {}
        for sizes in axes:
            step = self._lower(create_mesh(sizes, own.device_type()))
            manifests.append(self._describe(step))
            first, last = manifests[0], manifests[-1]
            if len(manifests) == 1:
                constants = _constants(step)
            elif (first.state, first.updates) != (last.state, last.updates):
                raise RuntimeError(
                    "The step uses other variables on another mesh, so one file "
                    f"cannot hold both. Save one by one. Received: mesh={sizes}"
                )
            programs.append(_export(step, last, sizes, platforms, self._used(step)))
            start = sum(variant.size for variant in variants)
            variants.append(Variant(sizes, start, len(programs[-1])))
        manifest = dataclasses.replace(
            manifests[0],
            variants=variants,
            platforms=list(platforms),
            initial_state=initial_state,
        )
        program_file.write_program(path, manifest, programs, constants)
        return manifest

    def _lower(self, mesh: dtensor.Mesh) -> lowering.LoweredStep:
        extended = self.strategy.extended
        fn = getattr(self.model, MODES[self.mode])

        def on_mesh(data):
            # Replaces the strategy's own mesh within its scope.
            with use_mesh(mesh, extended.layouts.rules):
                return fn(data)

        with self.strategy.scope():
            if is_abstract(self.model):
                return lower_abstract(extended, on_mesh, (self.specs,))
            specs = [spec for spec in tf.nest.flatten(self.specs) if spec is not None]

            def step(*tensors):
                values = iter(tensors)
                data = tf.nest.map_structure(
                    lambda spec: None if spec is None else next(values), self.specs
                )
                outputs = extended.run_step(on_mesh, (data,), {})
                return lowering.as_results(outputs)

            return lowering.lower(*lowering.trace(step, specs))

    def _describe(self, step: lowering.LoweredStep) -> Manifest:
        names: dict[int, tuple[str, Any]] = {
            id(backend_variable(variable)): (name, variable)
            for name, variable in training_state(self.model).items()
        }
        roles = variable_roles(self.model)
        layouts = step_layouts(self.strategy.extended.layouts, step)
        state = []
        seed: Any = global_seed_state()
        for i, value in enumerate(step.captures):
            if not isinstance(value, tf.Variable):
                state.append(
                    _tensor(f"constant/{i}", value, layouts.captures[i], "constant")
                )
                continue
            if value is seed:
                raise ValueError(
                    "A saved step must not draw from Keras's global seed generator, "
                    "which is neither the model's nor its optimizer's, so its state "
                    "could not be restored. Make a keras.random.SeedGenerator an "
                    "attribute of a layer, and pass it as seed= to the functions of "
                    "keras.random. "
                    f"Received: {value.name!r}"
                )
            if id(value) not in names:
                raise ValueError(
                    "Variables of a saved step must be the model's or its optimizer's, "
                    "or their values could not be restored. Make it an attribute of a "
                    f"layer. Received: the variable {value.name!r}"
                )
            name, variable = names[id(value)]
            role = roles.get(id(value), "other")
            # A file has one role for all that is neither trained nor reset.
            role = "other" if role == "frozen" else role
            tensor = _tensor(name, value, layouts.captures[i], role)
            state.append(dataclasses.replace(tensor, path=variable.path))
        inputs = list(batch_arrays(self.specs))
        outputs = [
            name for name, leaf in named_leaves(step.structure) if leaf is lowering.LEAF
        ]
        return Manifest(
            model=self.model.name,
            mode=self.mode,
            inputs=_tensors("input", inputs, step.inputs, layouts.inputs),
            outputs=_tensors("output", outputs, step.results, layouts.outputs),
            state=state,
            updates=list(step.updates),
            variants=[],
            platforms=[],
            versions={
                name: importlib.metadata.version(name)
                for name in ("tensorflow", "keras", "jax", "jaxlib")
            },
        )

    def _used(self, step: lowering.LoweredStep) -> list[PartitionSpec | None]:
        uses = step_layouts(self.strategy.extended.layouts, step).compute
        return [None if use is None else use.spec for use in uses]


def _check_metrics(model: keras.Model) -> None:
    """Raises `ValueError` unless resetting the metrics sets them to zero."""
    before = [
        (variable, variable.value.numpy()) for variable in model.metrics_variables
    ]
    model.reset_metrics()
    other = [variable.path for variable, _ in before if np.any(variable.value.numpy())]
    for variable, value in before:
        variable.assign(value)
    if other:
        raise ValueError(
            "Metrics must begin at zero, because without Keras they are reset to "
            f"zero. Received: {other}, which begin at other values"
        )


def halvings(mesh: dtensor.Mesh) -> list[dict[str, int]]:
    """Returns a mesh and its halvings, axis by axis, down to one device."""
    sizes = axis_sizes(mesh)
    meshes = [dict(sizes)]
    for axis in sizes:
        while sizes[axis] > 1:
            half = sizes[axis] % 2 == 0
            sizes[axis] = sizes[axis] // 2 if half else 1
            meshes.append(dict(sizes))
    return meshes


def _export(
    step: lowering.LoweredStep,
    manifest: Manifest,
    sizes: Mapping[str, int],
    platforms: Sequence[str],
    used: Sequence[PartitionSpec | None],
) -> bytes:
    import jax
    from jax import export

    mesh = create_mesh(sizes, "CPU")  # of abstract devices: any type

    def on_mesh(tensors: Iterable[Tensor]) -> list[MeshLayout]:
        return [MeshLayout(fit_layout(tensor, sizes), mesh) for tensor in tensors]

    layouts = StepLayouts(
        on_mesh(manifest.inputs),
        on_mesh(manifest.outputs),
        on_mesh(manifest.state),
        [None if use is None else MeshLayout(use, mesh) for use in used],
    )
    abstract = jax.sharding.AbstractMesh(tuple(sizes.values()), tuple(sizes))
    with jax.enable_x64(True):
        # The caller donates.
        jitted, shapes, _ = jit_step(step, abstract, layouts, donate=False)
        return bytes(export.export(jitted, platforms=platforms)(*shapes).serialize())


def _constants(step: lowering.LoweredStep) -> dict[str, np.ndarray]:
    return {
        f"constant/{i}": value.numpy()
        for i, value in enumerate(step.captures)
        if not isinstance(value, tf.Variable)
    }


def _tensors(
    role: str,
    names: Sequence[str],
    specs: Sequence[tf.TensorSpec],
    layouts: Sequence[MeshLayout],
) -> list[Tensor]:
    # There are more results than outputs: new values of state follow.
    return [
        _tensor(name, spec, layout, role)
        for name, spec, layout in zip(names, specs, layouts, strict=False)
    ]


def _tensor(name: str, value: Any, layout: MeshLayout, role: str) -> Tensor:
    return Tensor(name, tuple(value.shape), _dtype(value), layout.spec, role)


def _dtype(value: Any) -> str:
    return np.dtype(value.dtype.as_numpy_dtype).name


def _axes(own: dtensor.Mesh, mesh: int | Mapping[str, int]) -> dict[str, int]:
    names = list(own.dim_names)
    if isinstance(mesh, Mapping) and list(mesh) == names:
        return dict(mesh)
    if isinstance(mesh, int) and not isinstance(mesh, bool) and len(names) == 1:
        return {names[0]: mesh}
    raise ValueError(
        f"A mesh must have the axes of the strategy's, {names}, in that order, such "
        f"as {axis_sizes(own)}; or be a number of devices, if there is one axis. "
        f"Received: {mesh!r}"
    )
