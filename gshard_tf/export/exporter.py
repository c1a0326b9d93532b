"""A Keras step as a file: traced for each mesh, exported by jax, described by name.

This is the side that has TensorFlow; `loading.py` is the one that has not.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from tensorflow.experimental import dtensor

from gshard_tf.checkpoints.manifest import Array
from gshard_tf.checkpoints.matching import match
from gshard_tf.checkpoints.naming import array_of, training_state
from gshard_tf.compat.keras_seeds import global_seed_state
from gshard_tf.export import program_file
from gshard_tf.export.manifest import (
    Layout,
    Manifest,
    Tensor,
    Variant,
    fit_layout,
)
from gshard_tf.export.naming import named_batch, named_leaves
from gshard_tf.io.paths import local_path
from gshard_tf.sharding.mesh import create_mesh, use_mesh
from gshard_tf.spmd import lowering
from gshard_tf.spmd.abstract import is_abstract
from gshard_tf.spmd.abstract_step import lower_abstract
from gshard_tf.spmd.keras_step import (
    MODES,
    batch_specs,
    check_mode,
    complete,
    roles_of,
)
from gshard_tf.spmd.program import jit_step
from gshard_tf.spmd.step import StepLayouts, step_layouts

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")


class StepProgram:
    """A step of a model that can be saved; made by `strategy.program`.

    Args:
        strategy: The `SpmdStrategy` in whose scope the model was made; or an
            `AbstractStrategy`, for a model larger than this machine's memory.
        model: The model; its variables are completed as the first step of `fit` would.
        mode: "train", "evaluate" or "predict".
        batch: What `fit` passes to a step, as specs or arrays: the *global* batch.

    Raises:
        ValueError: for an unknown mode, a batch without static shapes, or a model
            that is not compiled.
    """

    def __init__(self, strategy: Any, model: keras.Model, mode: str, batch: Any):
        check_mode(mode)
        self.strategy = strategy
        self.model = model
        self.mode = mode
        self.specs = batch_specs(batch)
        with strategy.scope():
            complete(model, self.specs, mode)
        for variable in training_state(model).values():
            strategy.extended.ours(variable)
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
            initial_state: The name of a state file beside it (`strategy.save_state`)
                that the runner starts from.
            platforms: What it can be loaded on, as jax calls it.

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
        if _sizes(own) not in axes:
            axes = [_sizes(own), *axes]
        found: Manifest | None = None
        programs, variants, constants = [], [], {}
        for sizes in axes:
            step = self._lower(create_mesh(sizes, own.device_type()))
            described = self._describe(step)
            if found is None:
                found, constants = described, _constants(step)
            elif (found.state, found.updates) != (described.state, described.updates):
                raise RuntimeError(
                    "The step uses other variables on another mesh, so one file "
                    f"cannot hold both. Save one by one. Received: mesh={sizes}"
                )
            programs.append(
                _export(step, described, sizes, platforms, self._used(step))
            )
            start = sum(variant.size for variant in variants)
            variants.append(Variant(sizes, start, len(programs[-1])))
        manifest = dataclasses.replace(
            found,
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
            # Inside the strategy's own mesh, which this one stands for.
            with use_mesh(mesh, extended.layouts.rules):
                return fn(data)

        with self.strategy.scope():
            if is_abstract(self.model):
                return lower_abstract(extended, on_mesh, (self.specs,))
            given = [spec for spec in tf.nest.flatten(self.specs) if spec is not None]

            def step(*tensors):
                values = iter(tensors)
                data = tf.nest.map_structure(
                    lambda spec: None if spec is None else next(values), self.specs
                )
                outputs = extended.call_fn(on_mesh, (data,), {})
                return lowering.as_results(outputs)

            return lowering.lower(*lowering.trace(step, given))

    def _describe(self, step: lowering.LoweredStep) -> Manifest:
        names = {
            id(array_of(variable)): (name, variable)
            for name, variable in training_state(self.model).items()
        }
        roles = roles_of(self.model)
        layouts = step_layouts(self.strategy.extended.layouts, step)
        state = []
        for i, value in enumerate(step.captures):
            if not isinstance(value, tf.Variable):
                state.append(
                    _tensor(f"constant/{i}", value, layouts.captures[i], "constant")
                )
                continue
            if value is global_seed_state():
                raise ValueError(
                    "The step draws from Keras's global seed generator, which is "
                    "neither the model's nor its optimizer's, so nobody could put its "
                    "state back. Make a keras.random.SeedGenerator an attribute of a "
                    "layer, and pass it as seed= to the functions of keras.random. "
                    f"Received: {value.name!r}"
                )
            if id(value) not in names:
                raise ValueError(
                    f"The step uses the variable {value.name!r}, which is neither the "
                    "model's nor its optimizer's, so nobody could put its value back. "
                    "Make it an attribute of a layer."
                )
            name, variable = names[id(value)]
            role = roles.get(id(value), "other")
            tensor = _tensor(name, value, layouts.captures[i], role)
            state.append(dataclasses.replace(tensor, path=variable.path))
        inputs = list(named_batch(self.specs))
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

    def _used(self, step: lowering.LoweredStep) -> list[Layout | None]:
        uses = step_layouts(self.strategy.extended.layouts, step).uses
        return [None if use is None else _by_name(use) for use in uses]


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
            "Where there is no Keras, metrics are reset by setting them to zero, and "
            f"some of this model begin at something else. Received: {other}"
        )


def halvings(mesh: dtensor.Mesh) -> list[dict[str, int]]:
    """A mesh, and what halving its axes, the first one first, leads to; then one."""
    sizes = _sizes(mesh)
    found = [dict(sizes)]
    for axis in sizes:
        while sizes[axis] > 1:
            half = sizes[axis] % 2 == 0
            sizes[axis] = sizes[axis] // 2 if half else 1
            found.append(dict(sizes))
    return found


def _export(
    step: lowering.LoweredStep,
    manifest: Manifest,
    sizes: Mapping[str, int],
    platforms: Sequence[str],
    used: Sequence[Layout | None],
) -> bytes:
    import jax
    from jax import export

    mesh = create_mesh(sizes)

    def on_mesh(tensors: Iterable[Tensor]) -> list[dtensor.Layout]:
        return [_layout(fit_layout(tensor, sizes), mesh) for tensor in tensors]

    layouts = StepLayouts(
        on_mesh(manifest.inputs),
        on_mesh(manifest.outputs),
        on_mesh(manifest.state),
        [None if use is None else _layout(use, mesh) for use in used],
    )
    abstract = jax.sharding.AbstractMesh(tuple(sizes.values()), tuple(sizes))
    with jax.enable_x64(True), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*GSPMD.*")
        jitted, shapes, _ = jit_step(
            step,
            abstract,
            layouts.inputs,
            layouts.outputs,
            layouts.captures,
            layouts.uses,
            # Whoever calls it donates.
            donate=False,
        )
        return bytes(export.export(jitted, platforms=platforms)(*shapes).serialize())


def save_state(model: keras.Model, path: str | os.PathLike, step: int = 0) -> None:
    """Writes everything that a model, its metrics and its optimizer remember."""
    path = local_path(path)  # before everything is copied
    arrays = {
        name: array_of(variable).numpy()
        for name, variable in training_state(model).items()
    }
    program_file.write_state(path, arrays, step=step)


def load_state(model: keras.Model, path: str | os.PathLike) -> dict[str, Any]:
    """Assigns every variable of a model from a state file; nothing if it differs."""
    arrays, meta = program_file.read_state(path)
    variables = training_state(model)
    found = match(
        {name: (tuple(v.shape), _dtype(array_of(v))) for name, v in variables.items()},
        {name: Array(a.shape, a.dtype.name, "", ()) for name, a in arrays.items()},
    )
    for name, source in found.sources.items():
        variables[name].assign(arrays[source])
    return meta


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
    layouts: Sequence[dtensor.Layout],
) -> list[Tensor]:
    # (There are more results than outputs: new values of state follow.)
    return [
        _tensor(name, spec, layout, role)
        for name, spec, layout in zip(names, specs, layouts, strict=False)
    ]


def _tensor(name: str, value: Any, layout: dtensor.Layout, role: str) -> Tensor:
    return Tensor(name, tuple(value.shape), _dtype(value), _by_name(layout), role)


def _dtype(value: Any) -> str:
    return np.dtype(value.dtype.as_numpy_dtype).name


def _by_name(layout: dtensor.Layout) -> Layout:
    return tuple(None if s == dtensor.UNSHARDED else s for s in layout.sharding_specs)


def _layout(layout: Layout, mesh: dtensor.Mesh) -> dtensor.Layout:
    return dtensor.Layout(
        [dtensor.UNSHARDED if axis is None else axis for axis in layout], mesh
    )


def _sizes(mesh: dtensor.Mesh) -> dict[str, int]:
    return {name: mesh.dim_size(name) for name in mesh.dim_names}


def _axes(own: dtensor.Mesh, mesh: int | Mapping[str, int]) -> dict[str, int]:
    names = list(own.dim_names)
    if isinstance(mesh, Mapping) and list(mesh) == names:
        return dict(mesh)
    if isinstance(mesh, int) and not isinstance(mesh, bool) and len(names) == 1:
        return {names[0]: mesh}
    raise ValueError(
        f"A mesh has the axes of the strategy's, {names}, in that order, such as "
        f"{_sizes(own)}; or it is a number of devices, if there is one axis. "
        f"Received: {mesh!r}"
    )
