"""`plan()`: a Keras step, compiled for hardware that is not there."""

import dataclasses
import importlib.metadata
import os
import resource
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras
import tensorflow as tf
from tensorflow.experimental import dtensor

from gshard_tf.compat.jax_hlo import hlo_as_text
from gshard_tf.compat.keras_seeds import own_global_seed_generator
from gshard_tf.hlo import parser
from gshard_tf.hlo.collectives import collectives_of
from gshard_tf.planning import layer_names
from gshard_tf.planning.cache import Cache, content_key
from gshard_tf.planning.chips import Topology, find_topology
from gshard_tf.planning.memory import (
    advice_for,
    largest_as_written,
    memory_of,
    out_of_memory,
)
from gshard_tf.planning.plan import OutOfMemory, Plan, StepTime, Weight
from gshard_tf.planning.reshards import Judge, annotations, summarise
from gshard_tf.planning.roofline import Interconnect, step_time
from gshard_tf.runtime.device_arrays import Placement
from gshard_tf.sharding.layout_report import summarize_variable
from gshard_tf.sharding.mesh import axis_sizes, create_mesh
from gshard_tf.sharding.rules import AxisRules
from gshard_tf.sharding.sharded_variable import MeshVariableBase
from gshard_tf.sharding.variable_layouts import VariableLayouts
from gshard_tf.spmd.abstract import AbstractStrategy, is_abstract, lower_abstract
from gshard_tf.spmd.executable import compile_step
from gshard_tf.spmd.keras_step import (
    MODES,
    batch_specs,
    check_mode,
    complete,
    variable_roles,
)
from gshard_tf.spmd.lowering import LoweredStep
from gshard_tf.spmd.program import SpmdProgram


def plan(
    model: keras.Model | Callable[[], keras.Model],
    topology: str,
    mesh: dtensor.Mesh | Mapping[str, int] | None = None,
    rules: AxisRules | None = None,
    batch: Any = None,
    mode: str = "train",
    cache: bool | str | os.PathLike = True,
) -> Plan:
    """What a step of a model needs and does on hardware that one does not have.

    The model is built without allocating its weights, its own `train_step` is traced,
    partitioned over the mesh and compiled by the compiler of the topology: so memory,
    FLOPs and communication are those of the program that would run there. Step times
    are estimates.

    ```python
    def build():
        model = keras_layers.Transformer(...)
        model.compile("adafactor", loss)
        return model

    ids = tf.TensorSpec([128, 1024], tf.int32)
    print(gshard_tf.plan(build, "v3:8x8", batch=((ids, ids), ids)))
    ```

    Args:
        model: A function that makes the model and compiles it; or a model, which is
            made anew from its configuration.
        topology: A slice as its compiler calls it: `"v5e:2x4"` has 8 chips, `"v3:8x8"`
            64 chips with 128 cores (needs libtpu: `pip install 'gshard-tf[aot]'`).
            `"cpu:8"`: 8 virtual CPU devices, with what is installed.
        mesh: Axes and sizes, such as `{"data": 4, "model": 2}`, all cores together;
            or a mesh. None: `{"expert": number of cores}`.
        rules: An `AxisRules`; None: `AxisRules.default(mesh)`.
        batch: What `fit` passes to a step: `(x, y)` or `(x, y, sample_weight)`, or `x`
            alone, each a nest of `tf.TensorSpec`, `keras.KerasTensor` or arrays of
            which only shape and dtype are looked at. The *global* batch.
        mode: `"train"`, `"evaluate"` or `"predict"`.
        cache: Whether a plan of the same program for the same topology is taken from
            disk if there is one, or the folder of such plans. True: a folder
            `gshard_tf/plans` in the user's cache (`XDG_CACHE_HOME`, `~/.cache`).

    Returns:
        A `Plan`; `print` it, or look at its attributes.

    Raises:
        ValueError: for an unknown topology or mode, a mesh of another size, a batch
            without static shapes, a remote cache, or a model that cannot be planned,
            with the reason.
        ImportError: when a TPU is asked for and libtpu is not installed.
    """
    check_mode(mode)
    store = Cache.of(cache)
    specs = batch_specs(batch)
    found = find_topology(topology)
    mesh = _mesh_for(found, mesh)
    strategy = AbstractStrategy(mesh, rules)
    layouts: VariableLayouts = strategy.extended.layouts

    begun = time.perf_counter()
    graph = tf.compat.v1.get_default_graph()  # where TensorFlow keeps the scope
    try:
        with strategy.scope(), own_global_seed_generator():
            built = _build(model)
            complete(built, specs, mode)
            step = lower_abstract(
                strategy.extended, getattr(built, MODES[mode]), (specs,)
            )
    except IndexError as error:
        if tf.compat.v1.get_default_graph() is graph:
            raise
        raise ValueError(
            "The function that makes the model must not call "
            "keras.backend.clear_session(): it takes the scope away in which the model "
            "is built."
        ) from error
    trace_seconds = time.perf_counter() - begun
    weights = _weights(built, step, layouts)
    layers = layer_names.LayerNames(layer_names.layer_tree(built))

    versions = _versions()
    written_text = hlo_as_text(step.hlo)
    key = content_key(written_text, weights, found.name, mesh, mode, versions)
    known = store.load(key)
    if known is not None:
        return known

    begun = time.perf_counter()
    program, oom = _compile(
        strategy, step, Placement(mesh, found.devices), found, layers
    )
    compile_seconds = time.perf_counter() - begun
    written_module = parser.parse(written_text)
    if oom is not None and not oom.buffers:
        largest = largest_as_written(written_module, layers)
        oom = dataclasses.replace(oom, buffers=largest, as_written=True)
    judge = Judge(annotations(written_module, layers), weights, mesh, layouts.rules)
    loops = written_module.loops()
    facts = _program_facts(program, found, layers, judge, loops)
    uncounted = _uncounted(facts.pop("unknown_loops"), layers)
    written = _flops(written_module, loops)
    memory = None if program is None else memory_of(program, found.hbm_bytes)
    made = Plan(
        model=built.name,
        mode=mode,
        topology=found.name,
        chip=None if found.chip is None else _fields(found.chip),
        slice_shape=found.shape,
        mesh=axis_sizes(mesh),
        rules=dict(layouts.rules.rules),
        inputs=[
            f"{spec.dtype.name}[{','.join(map(str, spec.shape))}]"
            for spec in tf.nest.flatten(specs)
        ],
        weights=weights,
        memory=memory,
        out_of_memory=oom,
        flops_as_written=sum(written.values()) / mesh.size,
        complaints=uncounted + layouts.warnings(),
        advice=advice_for(weights, memory, oom, found.hbm_bytes, mesh),
        trace_seconds=trace_seconds,
        compile_seconds=compile_seconds,
        host_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        versions=versions,
        key=key,
        **facts,
    )
    store.save(made)
    return made


def _mesh_for(
    topology: Topology, mesh: dtensor.Mesh | Mapping[str, int] | None
) -> dtensor.Mesh:
    cores = len(topology.devices)
    if mesh is None:
        mesh = {"expert": cores}
    if not isinstance(mesh, dtensor.Mesh):
        mesh = create_mesh(mesh, "CPU" if topology.chip is None else "TPU")
    if mesh.size != cores:
        sizes = axis_sizes(mesh)
        raise ValueError(
            f"The mesh must have as many devices as the topology has cores: "
            f"{topology.name} has {cores}. Received: mesh={sizes} with {mesh.size}"
        )
    return mesh


def _build(model: keras.Model | Callable[[], keras.Model]) -> keras.Model:
    if isinstance(model, keras.Model):
        if is_abstract(model):
            raise ValueError(
                "This model was built for another plan. Pass the function that makes "
                "it."
            )
        compiled = model.get_compile_config() if model.compiled else None
        try:
            built = type(model).from_config(model.get_config())
        except (NotImplementedError, TypeError) as error:
            raise ValueError(
                "The model cannot be made anew from its configuration. Pass a "
                f"function that makes and compiles it. Keras says: {error}"
            ) from error
        if compiled is not None:
            built.compile_from_config(compiled)
        return built
    if not callable(model):
        raise ValueError(
            f"model is a keras.Model or a function that makes one. Received: {model!r}"
        )
    built = model()
    if not isinstance(built, keras.Model):
        raise ValueError(
            "The function must return the keras.Model that it makes. "
            f"Received: {built!r}"
        )
    if built.variables and not is_abstract(built):
        raise ValueError(
            "The function must make the model when it is called, so that no weight "
            "is allocated. Received: a model that was made before"
        )
    return built


def _weights(
    model: keras.Model, step: LoweredStep, layouts: VariableLayouts
) -> list[Weight]:
    roles = variable_roles(model)
    found = []
    for value in step.captures:
        if not isinstance(value, MeshVariableBase):
            continue
        row = summarize_variable(value.path, value, layouts)
        role = roles.get(id(value), "other")
        found.append(
            Weight(
                path=row.path,
                role="other" if role == "metric" else role,
                shape=row.shape,
                dtype=value.dtype.name,
                layout=row.layout,
                bytes=row.bytes,
                bytes_per_core=row.bytes_per_device,
                rule=row.rule,
            )
        )
    return found


def _compile(
    strategy: AbstractStrategy,
    step: LoweredStep,
    placement: Placement,
    topology: Topology,
    layers: layer_names.LayerNames,
) -> tuple[SpmdProgram | None, OutOfMemory | None]:
    try:
        return compile_step(strategy.extended.layouts, step, placement), None
    except RuntimeError as error:  # jaxlib's errors are all of this class
        found = out_of_memory(str(error), topology.hbm_bytes, layers)
        if found is None:
            raise
        return None, found


def _program_facts(
    program: SpmdProgram | None,
    topology: Topology,
    layers: layer_names.LayerNames,
    judge: Judge,
    loops: Mapping[str, int | None],
) -> dict[str, Any]:
    """What is read off the compiled program; nothing without one."""
    if program is None:
        return {
            "flops": None,
            "flops_by_layer": {},
            "bytes_accessed": None,
            "communication": [],
            "reshards": [],
            "time": None,
            "unknown_loops": [name for name, n in loops.items() if n is None],
        }
    module = parser.parse(program.compiled.as_text())
    by_layer: dict[str, float] = {}
    for op_name, flops in _flops(module, loops).items():
        layer = layers.layer_of(op_name)
        by_layer[layer] = by_layer.get(layer, 0.0) + flops
    total = sum(by_layer.values())
    cost = program.compiled.cost_analysis() or {}
    collectives = [
        dataclasses.replace(c, times=1) if c.times is None else c
        for c in collectives_of(module, loops)
    ]
    seconds: Sequence[float] = [0.0] * len(collectives)
    time_: StepTime | None = None
    if topology.chip is not None:
        links = Interconnect(topology, topology.chip)
        seconds = [links.seconds(c) for c in collectives]
        time_ = step_time(
            topology,
            topology.chip,
            total,
            cost.get("bytes accessed", 0.0),
            sum(c.times * s for c, s in zip(collectives, seconds, strict=True)),
            cost.get("optimal_seconds"),
        )
    communication, reshards = summarise(collectives, layers, judge, seconds)
    return {
        "flops": total,
        "flops_by_layer": by_layer,
        "bytes_accessed": cost.get("bytes accessed"),
        "communication": communication,
        "reshards": reshards,
        "time": time_,
        "unknown_loops": module.unknown_loops(loops),
    }


def _uncounted(loops: Sequence[str], layers: layer_names.LayerNames) -> list[str]:
    """A sentence about the loops whose turns nobody can count."""
    if not loops:
        return []
    where = sorted({layers.layer_of(name) or name for name in loops})
    return [
        f"How often the loops in {', '.join(where)} turn depends on values, so that "
        "what is in them counts once."
    ]


def _flops(
    module: parser.Module, loops: Mapping[str, int | None] | None = None
) -> dict[str, float]:
    """FLOPs of the products of a module, by the name of their operation."""
    found: dict[str, float] = {}
    for instruction, computation, times in module.executed(loops):
        flops = parser.product_flops(instruction, computation)
        if flops:
            name = instruction.op_name
            # In a loop that nobody can count: once; see `_uncounted`.
            found[name] = found.get(name, 0.0) + (1 if times is None else times) * flops
    return found


def _fields(chip: Any) -> dict[str, Any]:
    return {
        name: getattr(chip, name)
        for name in ("name", "devices", "flops", "hbm_bytes", "hbm_bandwidth",
                     "link_bandwidth", "wraps_at")
    }  # fmt: skip


def _versions() -> dict[str, str]:
    found = {}
    for package in ("tensorflow", "keras", "jaxlib", "libtpu"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
