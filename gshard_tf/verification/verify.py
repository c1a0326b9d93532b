"""`verify`: compares a step on the mesh with one device, before a long run."""

from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from gshard_tf.compat.keras_versions import check_is_keras_3
from gshard_tf.hlo.layer_names import LayerNames, layer_tree
from gshard_tf.runtime.process_group import group
from gshard_tf.sharding.mesh import axis_sizes, without_mesh
from gshard_tf.spmd import lowering
from gshard_tf.spmd.keras_step import (
    MODES,
    batch_specs,
    check_mode,
    complete,
    variable_roles,
)
from gshard_tf.spmd.strategy import SpmdExtended, SpmdStrategy
from gshard_tf.verification.comparison import StepToCheck, check_step
from gshard_tf.verification.report import VerificationReport


def verify(
    model: keras.Model,
    batch: Any,
    mode: str = "train",
    tolerance: float | None = None,
) -> VerificationReport:
    """Compares one step of a model on its mesh with the same step on one device.

    ```python
    report = gshard_tf.verify(model, (x[:64], y[:64]))
    print(report)
    report.check()  # raises VerificationError unless all is equal
    ```

    The step is run from the same state on the mesh, on the mesh's first device alone
    (the same lowered step, not partitioned), and by TensorFlow alone on the CPU.
    Losses, metrics, outputs and the change of each weight, slot, statistic and seed are
    compared. If the mesh and one device differ, the first differing instruction is
    searched for, and its layer.

    The model does not change by a bit: every run has copies of its state. A model that
    is not built yet is built, as the first step of `fit` would build it.

    Args:
        model: A model of an `SpmdStrategy`; compiled, unless it is only to predict.
        batch: What `fit` passes to a step: `(x, y)` or `(x, y, sample_weight)`, or `x`
            alone, each a nest of arrays. The *global* batch. Arrays of float64 become
            `keras.config.floatx()`, as `fit` makes them.
        mode: `"train"`, `"evaluate"` or `"predict"`.
        tolerance: The difference that equal numbers may have, relative to the largest
            of their array. None: by the narrowest floating type that the step computes
            with: 1e-4 for float32, 1e-1 for bfloat16, 2e-2 for float16, 1e-9 for
            float64. In addition, 8 times the effect of rounding the weights is
            allowed; the report shows the sum.

    Returns:
        A `VerificationReport`: `ok`, `check()`, `rows`, `origin`, and a table when
        printed.

    Raises:
        ValueError: for an unknown mode, a batch that is not made of arrays, a negative
            tolerance, a model that is not of an `SpmdStrategy` or not compiled, or
            several processes.
        TypeError: for a model of Keras 2.
        RuntimeError: when the step runs neither on one device nor in TensorFlow alone,
            such as for lack of memory.
    """
    check_mode(mode)
    check_tolerance(tolerance)
    strategy = strategy_of(model)
    extended = strategy.extended
    batch = _as_in_fit(batch)
    specs = batch_specs(batch)
    with strategy.scope():
        complete(model, specs, mode)
    fn = getattr(model, MODES[mode])
    flat_specs = [spec for spec in tf.nest.flatten(specs) if spec is not None]
    arrays = [np.asarray(leaf) for leaf in tf.nest.flatten(batch) if leaf is not None]

    def trace(fn: Callable[..., Any], jit_compile: bool) -> tuple[Any, Any]:
        def step(*tensors: tf.Tensor) -> Any:
            values = iter(tensors)
            data = tf.nest.map_structure(
                lambda spec: None if spec is None else next(values), specs
            )
            return extended.run_step(fn, (data,), {})

        with strategy.scope():
            return lowering.trace(step, flat_specs, jit_compile)

    return check_lowered(
        model,
        mode,
        extended,
        lowering.lower(*trace(fn, jit_compile=True)),
        lambda jit_compile: trace(without_mesh(fn), jit_compile)[0],
        arrays,
        tolerance,
    )


def check_lowered(
    model: keras.Model,
    mode: str,
    extended: SpmdExtended,
    step: lowering.LoweredStep,
    trace: Callable[[bool], Any],
    arrays: Sequence[np.ndarray],
    tolerance: float | None,
) -> VerificationReport:
    """Compares a step of a model that is lowered for its mesh.

    Args:
        model: The model.
        mode: The mode of the step.
        extended: The `SpmdExtended` of its strategy.
        step: The step.
        trace: Traces it without a mesh, to be compiled or not.
        arrays: The arguments of the step.
        tolerance: See `verify`.
    """
    mesh = extended.mesh
    sizes = axis_sizes(mesh)
    with extended.transfer.lock:
        return check_step(
            StepToCheck(
                extended,
                step,
                trace,
                arrays,
                variable_roles(model),
                LayerNames(layer_tree(model)),
                f"{mode} step of {model.name!r} on mesh {sizes}",
                trains=mode == "train",
            ),
            tolerance,
        )


def check_tolerance(tolerance: float | None) -> None:
    """Raises `ValueError` unless a tolerance is None or at least 0."""
    if tolerance is not None and not tolerance >= 0:
        raise ValueError(
            "`tolerance` must be at least 0, relative to the largest number of each "
            f"array, or None. Received: tolerance={tolerance!r}"
        )


def _check_alone() -> None:
    """Raises `ValueError` in a run of several processes."""
    if group().count > 1:
        raise ValueError(
            "`verify` must run in one process: its reference is one device that holds "
            "the whole model and batch, which one of several cannot run while "
            "the others wait. Use virtual CPU devices, for example. "
            f"Received: {group().count} processes"
        )


def strategy_of(model: keras.Model) -> SpmdStrategy:
    """Returns the strategy of a model; raises an error if it cannot be verified."""
    check_is_keras_3(model, "`verify`")
    strategy = model.distribute_strategy
    if not isinstance(strategy, SpmdStrategy):
        raise ValueError(
            "`model` must be created in the scope of an SpmdStrategy, whose mesh is "
            "compared with one device. Received: a model of "
            f"{type(strategy).__name__}"
        )
    _check_alone()
    return strategy


def _as_in_fit(batch: Any) -> Any:
    def cast(leaf: Any) -> Any:
        is_wide = isinstance(leaf, np.ndarray) and leaf.dtype == np.float64
        return leaf.astype(keras.config.floatx()) if is_wide else leaf

    for leaf in tf.nest.flatten(batch):
        if isinstance(leaf, tf.TensorSpec | keras.KerasTensor):
            raise ValueError(
                "`batch` must be of arrays or tensors, because verify runs the step. "
                f"Received: {leaf!r}"
            )
    return tf.nest.map_structure(cast, batch)
