"""TensorFlow's TPU strategy: its classes, and what its programs take as variables.

Relies on: the extended half of `tf.distribute.TPUStrategy` and its three classes of
variables, which subclasses override. On an upgrade, watch: `TPUExtended` (its
`_create_variable` in SPMD mode, `tpu_run`, `_tpu_devices`), the constructor of
`TPUStrategyV2`, `TPUReplicatedVariable.handle`, and that `TPUMirroredVariable` and
`TPUSyncOnReadVariable` reach their values through `_values`.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf
from tensorflow.core.framework import attr_value_pb2
from tensorflow.python.distribute import distribute_utils, tpu_util
from tensorflow.python.distribute.tpu_replicated_variable import TPUReplicatedVariable
from tensorflow.python.distribute.tpu_strategy import TPUExtended
from tensorflow.python.distribute.tpu_values import (
    TPUMirroredVariable,
    TPUSyncOnReadVariable,
)
from tensorflow.python.ops import gen_resource_variable_ops, gen_tpu_partition_ops

__all__ = [
    "TPUExtended",
    "TPUMirroredVariable",
    "TPUReplicatedVariable",
    "TPUSyncOnReadVariable",
    "core_devices",
    "create_distributed_variable",
    "in_tpu_program",
    "partitioned_input",
    "scatter_in_program",
    "set_packed_variables",
    "strategy_of",
]


def core_devices(extended: TPUExtended) -> np.ndarray:
    """Returns the names of the cores, `[replicas][cores of a replica]`.

    Relies on: `TPUExtended._tpu_devices`. On an upgrade, watch: its two dimensions.
    """
    return extended._tpu_devices


def strategy_of(extended: TPUExtended) -> tf.distribute.Strategy:
    """Returns the strategy whose extended half this is.

    Relies on: `StrategyExtendedV2._container_strategy`. On an upgrade, watch: its name.
    """
    return extended._container_strategy()


def set_packed_variables(strategy: tf.distribute.Strategy, packed: bool) -> None:
    """Sets whether one handle stands for a variable's copies on all cores.

    Relies on: `_enable_packed_variable_in_eager_mode`, which the constructor of
    `TPUStrategyV2` sets. On an upgrade, watch: where `TPUExtended` reads it.
    """
    strategy._enable_packed_variable_in_eager_mode = packed


def create_distributed_variable(
    strategy: tf.distribute.Strategy,
    create_values: Callable[..., list[Any]],
    on_write: type,
    on_read: type,
    /,
    **kwargs: Any,
) -> Any:
    """Creates the variable of a TPU strategy from those of its replicas.

    Relies on: `distribute_utils.create_mirrored_variable`. On an upgrade, watch: that
    the class is still chosen by the variable's synchronization.

    Args:
        strategy: The strategy.
        create_values: Creates the variables of the replicas.
        on_write: The class for a variable that is equal in all replicas.
        on_read: The class for a variable of which each replica has its own value.
        **kwargs: Those of `tf.Variable`.
    """
    return distribute_utils.create_mirrored_variable(
        strategy,
        create_values,
        {
            tf.VariableSynchronization.ON_WRITE: on_write,
            tf.VariableSynchronization.ON_READ: on_read,
        },
        distribute_utils.TPU_VARIABLE_POLICY_MAPPING,
        **kwargs,
    )


def in_tpu_program() -> bool:
    """Returns whether a TPU program is being traced.

    Relies on: `tpu_util.enclosing_tpu_context`. On an upgrade, watch: that `tpu_run`
    still traces within a `TPUReplicateContext`.
    """
    return not tf.executing_eagerly() and tpu_util.enclosing_tpu_context() is not None


def partitioned_input(
    handles: Sequence[tf.Tensor], partition_dims: Sequence[int], sharding: bytes
) -> tf.Tensor:
    """Returns one handle for a TPU program, of a variable that several cores store.

    Relies on: the operation `TPUPartitionedInputV2`, of which TensorFlow's bridge reads
    the attribute `_XlaSharding`. On an upgrade, compare with
    `TPUReplicatedVariable.handle`; watch: that handles are in the order of the shards.

    Args:
        handles: The handles of all cores, in the order of the shards.
        partition_dims: The number of shards along each dimension; empty: every core
            has a copy.
        sharding: The serialized `OpSharding`.
    """
    with tpu_util.outside_or_skip_tpu_context():
        whole = gen_tpu_partition_ops.tpu_partitioned_input_v2(
            list(handles), partition_dims=list(partition_dims), is_packed=False
        )
        whole.op._set_attr("_XlaSharding", attr_value_pb2.AttrValue(s=sharding))
    return whole


def scatter_in_program(kind: str, variable: Any, delta: tf.IndexedSlices) -> tf.Tensor:
    """Updates rows of a variable within a TPU program, and returns its new value.

    Relies on: `tpu_util.make_raw_scatter_xxx_fn`. On an upgrade, compare with
    `TPUMirroredVariable.scatter_add`; watch: which operations it is given.

    Args:
        kind: `"add"`, `"sub"` or `"update"`.
        variable: The variable.
        delta: The rows.
    """
    operation = getattr(gen_resource_variable_ops, f"resource_scatter_{kind}")
    return tpu_util.make_raw_scatter_xxx_fn(operation)(variable, sparse_delta=delta)
