"""A case of parity: a model, and the way to use it."""

import contextlib
import dataclasses
import re
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import tensorflow as tf

import gshard_tf

_RANDOM = np.random.default_rng(0)
X = _RANDOM.normal(size=[32, 8, 4]).astype("float32")
Y = _RANDOM.integers(0, 3, 32)
IDS = _RANDOM.integers(1, 16, [32, 8]).astype("int32")
FIT = {"batch_size": 8, "epochs": 2, "shuffle": False, "verbose": 0}

RULES = gshard_tf.AxisRules(
    {"batch": "data", "vocab": "model", "heads": "model", "mlp": "model"},
    paths=[
        (r"(.*/)?hidden/kernel", (None, "mlp")),
        (r"(.*/)?(word_)?embeddings?/embeddings", ("vocab", None)),
        (r".*/(query|key|value)/kernel", (None, "heads", None)),
        (r".*/attention_output/kernel", ("heads", None, None)),
        (r".*/intermediate/kernel", (None, "mlp")),
        (r".*/output/kernel", ("mlp", None)),
        (r"(.*/)?conv[^/]*/kernel", (None, None, None, "mlp")),
    ],
)
MESHES = {
    1: {"data": 1, "model": 1},
    2: {"data": 1, "model": 2},
    8: {"data": 4, "model": 2},
}


@dataclasses.dataclass(frozen=True)
class Case:
    """A model and the way to use it.

    Attributes:
        feature: The row of the table.
        make: Returns a compiled model, made by the Keras that it is given.
        use: Trains the model, and returns numbers, text and None in lists and dicts.
        tolerance: The largest relative difference that counts as equal.
        one_device: Whether the peer is in TensorFlow's `OneDeviceStrategy`, since what
            it uses wants a strategy.
    """

    feature: str
    make: Callable[[ModuleType], Any]
    use: Callable[[ModuleType, Any], Any]
    tolerance: float = 1e-4
    one_device: bool = False


def cross_entropy(K: ModuleType, **kwargs: Any) -> Any:
    return K.losses.SparseCategoricalCrossentropy(from_logits=True, **kwargs)


def classifier(K: ModuleType, optimizer: Any = None, **kwargs: Any) -> Any:
    """Returns a compiled model for `X` and `Y`, of which `RULES` split a weight."""
    inputs = K.Input([8, 4])
    x = K.layers.Flatten()(inputs)
    x = K.layers.Dense(16, "relu", name="hidden")(x)
    x = K.layers.BatchNormalization()(x)
    model = K.Model(inputs, K.layers.Dense(3, name="head")(x))
    optimizer = optimizer or K.optimizers.Adam(1e-2)
    model.compile(optimizer, cross_entropy(K), **{"metrics": ["accuracy"], **kwargs})
    return model


def fit(K: ModuleType, model: Any) -> Any:
    return model.fit(X, Y, **FIT).history


def slots(optimizer: Any) -> list[Any]:
    """Returns the variables of an optimizer of Keras 3, of Keras 2 or of its past."""
    variables = getattr(optimizer, "variables", [])
    return list(variables() if callable(variables) else variables)


def _state(model: Any) -> dict[str, np.ndarray]:
    variables = list(model.variables) + slots(getattr(model, "optimizer", None))
    return {
        f"{i} {variable.name}": np.array(variable.numpy())
        for i, variable in enumerate(variables)
        # The bias of attention's keys has no gradient but that of rounding.
        if not re.search("key[/_]bias", f"{variable.name} {_path(variable)}")
    }


def _path(variable: Any) -> str:
    return str(getattr(variable, "path", ""))


@dataclasses.dataclass(frozen=True)
class Run:
    """Results and state of a case.

    Attributes:
        result: Of `Case.use`.
        state: The value of each weight and slot.
        split: The number of variables that the mesh splits.
    """

    result: Any
    state: dict[str, np.ndarray]
    split: int = 0


def run(case: Case, K: ModuleType, partitions: int = 0) -> Run:
    """Runs a case on a mesh of so many devices; 0: without."""
    K.backend.clear_session()
    K.utils.set_random_seed(7)
    strategy: Any = None
    if partitions:
        mesh = gshard_tf.create_mesh(MESHES[partitions], device_type="CPU")
        strategy = gshard_tf.SpmdStrategy(mesh, RULES)
    elif case.one_device:
        strategy = tf.distribute.OneDeviceStrategy("/cpu:0")
    with strategy.scope() if strategy else contextlib.nullcontext():
        model = case.make(K)
    result = case.use(K, model)
    split = 0
    if partitions:
        if not strategy.programs:
            raise RuntimeError(
                f"A case must run on its mesh. Received: {case.feature!r}, of which "
                "nothing did"
            )
        rows = strategy.describe(model).rows
        split = sum(row.bytes_per_device < row.bytes for row in rows)
    return Run(result, _state(model), split)


def difference(found: Any, expected: Any) -> float:
    """Largest difference in nests alike, relative to the largest value of an array."""
    if isinstance(expected, dict):
        if set(found) != set(expected):
            return float("inf")
        return max([0.0, *(difference(found[k], expected[k]) for k in expected)])
    if isinstance(expected, list | tuple):
        if len(found) != len(expected):
            return float("inf")
        each = zip(found, expected, strict=True)
        return max([0.0, *(difference(a, b) for a, b in each)])
    if expected is None or isinstance(expected, str):
        return 0.0 if found == expected else float("inf")
    a, b = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    if a.shape != b.shape:
        return float("inf")
    if np.array_equal(a, b, equal_nan=True):
        return 0.0
    worst = np.max(np.abs(a - b)) / max(float(np.max(np.abs(b))), 1e-30)
    return float("inf") if np.isnan(worst) else float(worst)


def compare(found: Run, expected: Run) -> float:
    """Returns the largest difference of results and state of two runs."""
    return max(
        difference(found.result, expected.result),
        difference(found.state, expected.state),
    )
