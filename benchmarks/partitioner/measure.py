"""Measures of one case: difference to one device, communication, memory."""

import collections
import contextlib
import math
from collections.abc import Mapping
from typing import Any

import keras
import numpy as np
import tensorflow as tf

import gshard_tf
from benchmarks.partitioner.cases import Case

# Bytes of sums of scalars: losses, metrics, statistics of routers.
SLACK = 2048


def model_of(case: Case) -> keras.Model:
    """The model of a case, compiled. Its optimizer's slots are its gradients."""
    keras.utils.set_random_seed(3)
    dtype = "int32" if case.ids else "float32"
    x = inputs = keras.Input(case.x[1:], dtype=dtype)
    for layer in case.layers():
        x = layer(x)
    model = keras.Model(inputs, x)
    loss = "mse" if case.loss is None else case.loss()
    model.compile(keras.optimizers.SGD(0.01, momentum=0.9), loss)
    return model


def max_rel(case: Case) -> float:
    """The largest difference of two train steps on the mesh and in plain Keras.

    Of losses, weights and slots; each relative to its largest value.
    """
    x, y = _data(case)
    found = []
    for strategy in (None, _strategy(case)):
        keras.backend.clear_session(free_memory=False)
        with contextlib.nullcontext() if strategy is None else strategy.scope():
            model = model_of(case)
        losses = [_step(model, x, y) for _ in range(2)]
        variables = [*model.trainable_variables, *model.optimizer.variables]
        found.append([np.array(losses), *(v.numpy() for v in variables)])
    plain, meshed = found
    return max(
        float(np.max(np.abs(a - b)) / max(np.max(np.abs(a)), 1e-30))
        for a, b in zip(plain, meshed, strict=True)
        if a.dtype.kind == "f"
    )


def planned(case: Case, topology: str, devices: int) -> gshard_tf.Plan:
    """The plan of a train step for a topology, or for one of its devices."""
    mesh = dict(case.mesh)
    if devices == 1:
        mesh = dict.fromkeys(mesh, 1)
    x, y = (tf.TensorSpec(a.shape, a.dtype) for a in _data(case))
    keras.backend.clear_session(free_memory=False)
    return gshard_tf.plan(
        lambda: model_of(case),
        topology,
        mesh,
        gshard_tf.AxisRules(**case.rules),
        (x, y),
        cache=False,
    )


def communication(plan: gshard_tf.Plan) -> dict[str, dict[str, int]]:
    """Number and bytes of the collectives of a plan, by kind."""
    found: dict[str, dict[str, int]] = collections.defaultdict(
        lambda: {"count": 0, "bytes": 0}
    )
    for each in plan.communication:
        found[each.kind]["count"] += each.count
        found[each.kind]["bytes"] += each.bytes
    return dict(found)


def is_as_expected(
    expected: Mapping[str, int], found: Mapping[str, Mapping[str, int]]
) -> bool:
    """Returns whether each kind has the expected bytes, apart from sums of scalars."""
    for kind in {*expected, *found}:
        bytes_ = found[kind]["bytes"] if kind in found else 0
        if abs(bytes_ - expected.get(kind, 0)) > SLACK:
            return False
    return True


def memory(
    case: Case, whole: gshard_tf.Plan, split: gshard_tf.Plan
) -> dict[str, int | float]:
    """Memory of a device, and over what it is measured against.

    An equal share is what rules store on a device, and an eighth of what one device
    computes with. The ideal has what the layout keeps, too (`Case.kept`).

    Args:
        case: The case.
        whole: The plan for one device.
        split: The plan for the mesh.
    """
    devices = math.prod(split.mesh.values())
    found = split.memory.arguments + split.memory.temporaries
    share = split.memory.arguments + whole.memory.temporaries / devices
    return {
        "memory": found,
        "memory_over_share": round(found / share, 3),
        "memory_over_ideal": round(found / (share + case.kept), 3),
    }


def _step(model: keras.Model, x: Any, y: Any) -> float:
    data = tf.data.Dataset.from_tensors((x, y))
    return model.fit(data, verbose=0, shuffle=False).history["loss"][0]


def _strategy(case: Case) -> gshard_tf.SpmdStrategy:
    mesh = gshard_tf.create_mesh(case.mesh)
    return gshard_tf.SpmdStrategy(mesh, gshard_tf.AxisRules(**case.rules))


def _data(case: Case) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    if case.ids:
        x = rng.integers(0, case.ids, case.x).astype("int32")
    else:
        x = rng.normal(size=case.x).astype("float32")
    shape = case.x if case.y is None else case.y
    if case.loss is not None:
        return x, rng.integers(0, 100, shape).astype("int32")
    return x, rng.normal(size=shape).astype("float32")
