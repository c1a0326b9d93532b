"""`plan()`: compiles a Keras step for hardware you need not have, and measures it."""

import dataclasses
import importlib.metadata
import os
import resource
import time
from collections.abc import Callable, Mapping
from typing import Any

import keras
import tensorflow as tf
from tensorflow.experimental import dtensor

from gshard_tf.compat.jax_hlo import hlo_as_text
from gshard_tf.hlo import layer_names, parser
from gshard_tf.hlo.flops import flops_of_a_device
from gshard_tf.planning.cache import PlanCache, content_key
from gshard_tf.planning.chips import Topology, find_topology
from gshard_tf.planning.memory import (
    advice_for,
    largest_as_written,
    memory_of,
    out_of_memory,
)
from gshard_tf.planning.plan import Plan
from gshard_tf.planning.program_facts import program_facts, uncounted_loops
from gshard_tf.planning.records import OutOfMemory, Pipeline, Weight
from gshard_tf.planning.reshards import ReshardClassifier, annotations
from gshard_tf.planning.summaries import compiler
from gshard_tf.planning.tracing import trace_step
from gshard_tf.runtime.device_arrays import Placement
from gshard_tf.sharding.layout_report import summarize_variable
from gshard_tf.sharding.mesh import axis_sizes, create_mesh
from gshard_tf.sharding.rules import AxisRules
from gshard_tf.sharding.sharded_variable import MeshVariableBase
from gshard_tf.sharding.variable_layouts import VariableLayouts
from gshard_tf.sharding.vectorize import recorded_pipelines
from gshard_tf.spmd.abstract import AbstractStrategy
from gshard_tf.spmd.executable import compile_step
from gshard_tf.spmd.keras_step import batch_specs, check_mode, variable_roles
from gshard_tf.spmd.lowering import LoweredStep
from gshard_tf.spmd.program import SpmdProgram


def plan(
    model: keras.Model | Callable[[], keras.Model],
    topology: str,
    mesh: dtensor.Mesh
    | keras.distribution.DeviceMesh
    | Mapping[str, int]
    | None = None,
    rules: AxisRules | keras.distribution.LayoutMap | None = None,
    batch: Any = None,
    mode: str = "train",
    cache: bool | str | os.PathLike = True,
    progress: Callable[[str], None] | None = None,
) -> Plan:
    """Reports memory, FLOPs and communication of a step on hardware you need not have.

    The model is built without allocating its weights. Its own `train_step` is traced,
    partitioned over the mesh and compiled by the compiler of the topology, so memory,
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
        model: A function that creates the model and compiles it; or a model, which is
            created again from its configuration.
        topology: A slice by its compiler's name: `"v5e:2x4"` has 8 chips, `"v3:8x8"`
            64 chips with 128 cores (needs libtpu: `pip install 'gshard-tf[aot]'`).
            `"cpu:8"` is 8 virtual CPU devices and needs nothing more.
        mesh: Axes and sizes, such as `{"data": 4, "model": 2}`, whose product is the
            number of cores; or a mesh, or a `keras.distribution.DeviceMesh`, of which
            only axes and sizes are read. None: the mesh of a layout map, or else
            `{"expert": number of cores}`.
        rules: An `AxisRules` or a `keras.distribution.LayoutMap`; None:
            `AxisRules.default(mesh)`.
        batch: What `fit` passes to a step: `(x, y)` or `(x, y, sample_weight)`, or `x`
            alone, each a nest of `tf.TensorSpec`, `keras.KerasTensor` or arrays, of
            which only shape and dtype are read. The *global* batch.
        mode: `"train"`, `"evaluate"` or `"predict"`.
        cache: Whether a plan of the same program for the same topology is read from
            disk if one exists, or the folder of such plans. True: the folder
            `gshard_tf/plans` in the user's cache (`XDG_CACHE_HOME`, `~/.cache`).
        progress: Called with what begins: tracing and compiling may take minutes.

    Returns:
        A `Plan`; `print` it, or read its attributes.

    Raises:
        ValueError: for an unknown topology or mode, a mesh of another size, a batch
            without static shapes, a remote cache, or a model that cannot be planned.
        ImportError: for a TPU topology when libtpu is not installed.
    """
    check_mode(mode)
    plans = PlanCache.from_option(cache)
    specs = batch_specs(batch)
    hardware = find_topology(topology)
    if mesh is None and isinstance(rules, keras.distribution.LayoutMap):
        mesh = rules.device_mesh
    device_mesh = _mesh_for(hardware, mesh)
    hardware = hardware.in_order_of(device_mesh)
    strategy = AbstractStrategy(device_mesh, rules)
    layouts: VariableLayouts = strategy.extended.layouts

    report = progress or (lambda text: None)
    report("building and tracing ...")
    start = time.perf_counter()
    with recorded_pipelines() as pipelines:
        built, step = trace_step(model, strategy, specs, mode)
    trace_seconds = time.perf_counter() - start
    weights = _weights(built, step, layouts)
    layers = layer_names.LayerNames(layer_names.layer_tree(built))

    versions = _versions()
    written_text = hlo_as_text(step.hlo)
    key = content_key(written_text, weights, hardware.name, device_mesh, mode, versions)
    cached = plans.load(key)
    if cached is not None:
        report("the plan of this program was made before")
        return cached

    report(
        f"traced in {trace_seconds:.1f} s; compiling with "
        f"{compiler(hardware.chip is not None, versions)} ..."
    )
    start = time.perf_counter()
    placement = Placement(device_mesh, hardware.devices)
    program, oom = _compile(strategy, step, placement, hardware, layers)
    compile_seconds = time.perf_counter() - start
    written_module = parser.parse(written_text)
    if oom is not None and not oom.buffers:
        largest = largest_as_written(written_module, layers)
        oom = dataclasses.replace(oom, buffers=largest, as_written=True)
    classifier = ReshardClassifier(
        annotations(written_module, layers), weights, device_mesh, layouts.rules
    )
    loops = written_module.loops()
    facts = program_facts(program, hardware, layers, classifier, loops)
    uncounted = uncounted_loops(facts.pop("unknown_loops"), layers)
    memory = None if program is None else memory_of(program, hardware.hbm_bytes)
    result = Plan(
        model=built.name,
        mode=mode,
        topology=hardware.name,
        chip=None if hardware.chip is None else _fields(hardware.chip),
        slice_shape=hardware.shape,
        mesh=axis_sizes(device_mesh),
        rules=dict(layouts.rules.rules),
        inputs=[
            f"{spec.dtype.name}[{','.join(map(str, spec.shape))}]"
            for spec in tf.nest.flatten(specs)
        ],
        weights=weights,
        memory=memory,
        out_of_memory=oom,
        flops_as_written=flops_of_a_device(written_module, device_mesh.size, loops),
        complaints=uncounted + layouts.warnings(),
        advice=advice_for(weights, memory, oom, hardware.hbm_bytes, device_mesh),
        trace_seconds=trace_seconds,
        compile_seconds=compile_seconds,
        host_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        versions=versions,
        key=key,
        pipelines=[Pipeline(name, *shape) for name, shape in pipelines.items()],
        **facts,
    )
    plans.save(result)
    return result


def _mesh_for(
    topology: Topology,
    mesh: dtensor.Mesh | keras.distribution.DeviceMesh | Mapping[str, int] | None,
) -> dtensor.Mesh:
    cores = len(topology.devices)
    if isinstance(mesh, dtensor.Mesh):
        device_mesh: dtensor.Mesh = mesh
    else:
        if isinstance(mesh, keras.distribution.DeviceMesh):
            mesh = dict(zip(mesh.axis_names, map(int, mesh.shape), strict=True))
        sizes = {"expert": cores} if mesh is None else mesh
        device_mesh = create_mesh(sizes, "CPU" if topology.chip is None else "TPU")
    if device_mesh.size != cores:
        raise ValueError(
            f"The mesh must have as many devices as the topology has cores: "
            f"{topology.name} has {cores}. Received: "
            f"mesh={axis_sizes(device_mesh)} with {device_mesh.size}"
        )
    return device_mesh


def _weights(
    model: keras.Model, step: LoweredStep, layouts: VariableLayouts
) -> list[Weight]:
    roles = variable_roles(model)
    weights = []
    for value in step.captures:
        if not isinstance(value, MeshVariableBase):
            continue
        row = summarize_variable(value.path, value, layouts)
        role = roles.get(id(value), "other")
        weights.append(
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
    return weights


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
        oom = out_of_memory(str(error), topology.hbm_bytes, layers)
        if oom is None:
            raise
        return None, oom


def _fields(chip: Any) -> dict[str, Any]:
    return {
        name: getattr(chip, name)
        for name in ("name", "devices", "flops", "hbm_bytes", "hbm_bandwidth",
                     "link_bandwidth", "wraps_at")
    }  # fmt: skip


def _versions() -> dict[str, str]:
    versions = {}
    for package in ("tensorflow", "keras", "jaxlib", "libtpu"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions
