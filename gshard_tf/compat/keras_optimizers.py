"""Keras's optimizers below their public face."""

from collections.abc import Callable
from typing import TypeAlias

import keras

Slot: TypeAlias = "keras.Variable | None"


def build_adafactor(
    optimizer: keras.optimizers.Adafactor,
    variables: list[keras.Variable],
    create_slots: Callable[[keras.Variable], tuple[Slot, Slot, Slot]],
) -> None:
    """Builds an Adafactor with other slots than Keras's own `build` adds.

    Relies on: `build` of Keras's base class, and the lists `_r`, `_c` and `_v`, in the
    order of the variables. On an upgrade, watch: what else `Adafactor.build` does than
    adding slots, and that its `update_step` uses `_v` alone for one dimension.

    Args:
        optimizer: The optimizer; not built yet.
        variables: Its weights.
        create_slots: Returns the factor of a weight's rows, that of its columns and
            the slot of its own size.
    """
    super(keras.optimizers.Adafactor, optimizer).build(variables)
    optimizer._r, optimizer._c, optimizer._v = [], [], []
    for variable in variables:
        rows, columns, whole = create_slots(variable)
        optimizer._r.append(rows)
        optimizer._c.append(columns)
        optimizer._v.append(whole)


def adafactor_factors(
    optimizer: keras.optimizers.Adafactor, variable: keras.Variable
) -> tuple[keras.Variable, keras.Variable]:
    """Returns the factors of a weight's rows and columns.

    Relies on: `_get_variable_index`, and the lists of `build_adafactor`. On an upgrade,
    watch: that `update_step` finds its slots in this way.
    """
    index = optimizer._get_variable_index(variable)
    return optimizer._r[index], optimizer._c[index]


def has_scheduled_rate(optimizer: keras.optimizers.Optimizer) -> bool:
    """Returns whether the learning rate is a schedule or another callable.

    Relies on: `_learning_rate`, which the optimizer was given; `learning_rate` is its
    current value. On an upgrade, watch: its name.
    """
    return callable(optimizer._learning_rate)
