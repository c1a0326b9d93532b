"""Names of a run's variables that are the same in every process.

Keras numbers layers by a counter of the process (`dense`, `dense_1`, ...), so its
paths differ from one process to the next, and they need not be unique. Here every
layer is numbered by the order within its model instead.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import TypeAlias

import keras
import tensorflow as tf

from gshard_tf.compat.keras_versions import check_is_keras_3

Variable: TypeAlias = keras.Variable | tf.Variable


def training_state(
    model: keras.Model,
    extra_state: Mapping[str, Variable | keras.optimizers.Optimizer] | None = None,
) -> dict[str, Variable]:
    """Returns every variable that a run of `model` has, by name.

    Names begin with `model/` (weights, statistics and seeds), `optimizer/` (slots,
    iterations, the learning rate, the loss scale) or `metrics/`. A slot is named like
    its weight: `optimizer/dense/kernel/momentum`.

    Args:
        model: A built model.
        extra_state: Variables that the model does not know of, and other optimizers
            (built), by a name for each.

    Raises:
        ValueError: when the model is not built.
        TypeError: for a model of Keras 2.
    """
    check_is_keras_3(model, "A checkpoint")
    if not model.built:
        raise ValueError(
            "`model` must be built before it has its variables: call it on a batch, or "
            f"model.build(shape), first. Received: {model.name!r}, which is not built"
        )
    numbers = _Numbers()
    names: dict[int, str] = {}
    state: dict[str, Variable] = {}
    for variable in model.variables:
        names[id(variable)] = numbers.path(variable.path)
        _add(state, f"model/{names[id(variable)]}", variable)
    weights = [
        (v.path.replace("/", "_"), names[id(v)]) for v in model.trainable_variables
    ]
    optimizer = getattr(model, "optimizer", None)
    if optimizer is not None:
        if not optimizer.built:
            with model.distribute_strategy.scope():
                optimizer.build(model.trainable_variables)
        _add_optimizer(state, "optimizer", optimizer, weights)
    saved = {id(v) for v in state.values()}
    for variable in model.metrics_variables:
        if id(variable) not in saved:
            _add(state, f"metrics/{numbers.path(variable.path)}", variable)
    for name, value in (extra_state or {}).items():
        if isinstance(value, keras.optimizers.Optimizer):
            _add_optimizer(state, f"extra/{name}", value, weights)
        else:
            _add(state, f"extra/{name}", value)
    return state


def section(name: str) -> str:
    """Returns the section of a name: `model`, `optimizer`, `metrics` or `extra`."""
    return name.partition("/")[0]


class _Numbers:
    """Numbers the parts of paths by their order of appearance."""

    def __init__(self) -> None:
        self.renamed: dict[str, str] = {}
        self.counts: Counter[str] = Counter()

    def path(self, path: str) -> str:
        *layers, leaf = path.split("/")
        return "/".join([*map(self._part, layers), leaf])

    def _part(self, part: str) -> str:
        if part not in self.renamed:
            base = re.sub(r"_\d+\Z", "", part)
            count = self.counts[base]
            self.counts[base] += 1
            self.renamed[part] = f"{base}_{count}" if count else base
        return self.renamed[part]


def _add_optimizer(
    state: dict[str, Variable],
    prefix: str,
    optimizer: keras.optimizers.Optimizer,
    weights: Iterable[tuple[str, str]],
) -> None:
    longest_first = sorted(weights, key=lambda pair: -len(pair[0]))
    for variable in optimizer.variables:
        leaf = variable.path.split("/")[-1]
        for flat, name in longest_first:
            if leaf.startswith(f"{flat}_"):
                leaf = f"{name}/{leaf[len(flat) + 1 :]}"
                break
        _add(state, f"{prefix}/{leaf}", variable)


def _add(state: dict[str, Variable], name: str, variable: Variable) -> None:
    unique, count = name, 1
    while unique in state:
        count += 1
        unique = f"{name}#{count}"
    state[unique] = variable
