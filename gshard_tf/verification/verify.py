"""`verify`: whether the mesh computes what one device does, before a long run."""

from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from gshard_tf.planning.layer_names import LayerNames, layer_tree
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
from gshard_tf.spmd.strategy import SpmdStrategy
from gshard_tf.verification.checking import StepToCheck, check_step
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
    Losses, metrics, outputs and what the step adds to each weight, slot, statistic and
    seed are compared. Where the mesh and one device differ, the first instruction that
    does is looked for, and the layer that it belongs to.

    The model stays as it is, to the bit: every run has copies of its state. One that is
    not built yet is built, as the first step of `fit` would.

    Args:
        model: A model of an `SpmdStrategy`; compiled, unless it is only to predict.
        batch: What `fit` passes to a step: `(x, y)` or `(x, y, sample_weight)`, or `x`
            alone, each a nest of arrays. The *global* batch. Arrays of float64 become
            `keras.config.floatx()`, as `fit` makes them.
        mode: `"train"`, `"evaluate"` or `"predict"`.
        tolerance: How far equal numbers may lie apart, relative to the largest of their
            array, so 1.0 is all of it. None: by the narrowest floating type that the
            step computes with: 1e-4 for float32, 1e-1 for bfloat16, 2e-2 for float16,
            1e-9 for float64. What rounding the weights differently does to a value,
            times 8, is allowed besides; the report says how much that is.

    Returns:
        A `VerificationReport`: `ok`, `check()`, `rows`, `origin`, and a table when
        printed.

    Raises:
        ValueError: for an unknown mode, a batch that is not made of arrays, a negative
            tolerance, a model that is not of an `SpmdStrategy` or not compiled, or
            several processes.
        RuntimeError: when the step runs neither on one device nor in TensorFlow alone,
            such as for want of memory.
    """
    check_mode(mode)
    check_tolerance(tolerance)
    strategy = strategy_of(model)
    extended = strategy.extended
    batch = _as_fit_makes_it(batch)
    specs = batch_specs(batch)
    with strategy.scope():
        complete(model, specs, mode)
    fn = getattr(model, MODES[mode])
    given = [spec for spec in tf.nest.flatten(specs) if spec is not None]
    arrays = [np.asarray(leaf) for leaf in tf.nest.flatten(batch) if leaf is not None]

    def trace(fn: Callable[..., Any], jit_compile: bool) -> tuple[Any, Any]:
        def step(*tensors: tf.Tensor) -> Any:
            values = iter(tensors)
            data = tf.nest.map_structure(
                lambda spec: None if spec is None else next(values), specs
            )
            return extended.run_step(fn, (data,), {})

        with strategy.scope():
            return lowering.trace(step, given, jit_compile)

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
    extended: Any,
    step: lowering.LoweredStep,
    trace: Callable[[bool], Any],
    arrays: Sequence[np.ndarray],
    tolerance: float | None,
) -> VerificationReport:
    """Compares a step of a model that has been lowered for its mesh.

    Args:
        model: The model.
        mode: Which of its steps it is.
        extended: The `SpmdExtended` of its strategy.
        step: The step.
        trace: Traces it without a mesh, for compiling or not.
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
    """Raises `ValueError` for a tolerance that no difference can have."""
    if tolerance is not None and not tolerance >= 0:
        raise ValueError(
            "tolerance is a number from 0 on, relative to the largest number of each "
            f"array, or None. Received: tolerance={tolerance!r}"
        )


def _check_alone() -> None:
    """Raises `ValueError` in a run of several processes."""
    if group().count > 1:
        raise ValueError(
            "The reference is one device that holds the whole model and batch, which "
            "one of several processes cannot run while the others wait. Verify in a "
            "run of one process, on virtual CPU devices, say. "
            f"Received: {group().count} processes"
        )


def strategy_of(model: keras.Model) -> SpmdStrategy:
    """The strategy of a model; raises `ValueError` where nothing can be verified."""
    strategy = model.distribute_strategy
    if not isinstance(strategy, SpmdStrategy):
        raise ValueError(
            "verify compares an SpmdStrategy's mesh with one device. Make the model in "
            "its scope. Received: a model of "
            f"{type(strategy).__name__}"
        )
    _check_alone()
    return strategy


def _as_fit_makes_it(batch: Any) -> Any:
    def cast(leaf: Any) -> Any:
        is_wide = isinstance(leaf, np.ndarray) and leaf.dtype == np.float64
        return leaf.astype(keras.config.floatx()) if is_wide else leaf

    for leaf in tf.nest.flatten(batch):
        if isinstance(leaf, tf.TensorSpec | keras.KerasTensor):
            raise ValueError(
                "verify runs the step, so the batch has numbers: arrays or tensors. "
                f"Received: {leaf!r}"
            )
    return tf.nest.map_structure(cast, batch)
