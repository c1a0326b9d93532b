"""Balance of load without a loss: a bias on the scores, moved by the load."""

import contextlib
import contextvars
from collections.abc import Iterator, Sequence

import keras
import tensorflow as tf

_PARTS: contextvars.ContextVar[int] = contextvars.ContextVar(
    "keras_layers_parts_of_batch", default=1
)


@contextlib.contextmanager
def parts_of_batch(count: int) -> Iterator[None]:
    """Context in which a router is called `count` times for each batch."""
    token = _PARTS.set(count)
    try:
        yield
    finally:
        _PARTS.reset(token)


def calls_per_batch() -> int:
    """Returns how often a router is called for each batch."""
    return _PARTS.get()


def bias_direction(load: tf.Tensor, masked_experts: Sequence[int] = ()) -> tf.Tensor:
    """Sign of each expert's bias update, DeepSeek-V3 (arXiv 2412.19437, 2.1.2).

    Args:
        load: `[E]` float32, how many tokens requested each expert.
        masked_experts: Experts that no token goes to: they have no share of the load.

    Returns:
        `[E]` float32: 1 for experts with less than their share, -1 for those with more,
        0 for those that are masked.
    """
    experts = range(load.shape[0])
    is_open = tf.constant([float(e not in masked_experts) for e in experts])
    share = tf.reduce_sum(load * is_open) / tf.reduce_sum(is_open)
    return is_open * tf.sign(share - load)


def sum_over_replicas(x: tf.Tensor) -> tf.Tensor:
    """The sum over the replicas of a `tf.distribute` strategy, the same in each.

    A partitioned step has one replica, which sees the global batch.
    """
    context = tf.distribute.get_replica_context()
    if context is None or context.num_replicas_in_sync == 1:
        return x
    return context.all_reduce(tf.distribute.ReduceOp.SUM, x)


class LoadSoFar(keras.metrics.Metric):
    """Load, and number, of the batches since the weights were updated.

    A metric because metrics are state without being weights: files of weights leave it
    out, checkpoints may contain it. It reports nothing.

    Args:
        num_experts: E.
    """

    def __init__(self, num_experts: int):
        super().__init__(name="load_so_far", dtype="float32")
        self.load = self.add_variable((num_experts,), "zeros", name="load")
        self.batches = self.add_variable((), "zeros", name="batches")

    def update_state(self, load: tf.Tensor) -> None:
        """Adds the load `[E]` of a batch."""
        self.load.assign_add(load)
        self.batches.assign_add(1.0)

    def reset_if(self, due: tf.Tensor) -> None:
        """Resets the sums if `due`, a bool scalar."""
        for variable in self.variables:
            value = tf.convert_to_tensor(variable)
            variable.assign(tf.where(due, tf.zeros_like(value), value))

    def reset_state(self) -> None:
        """Does nothing: updates of the weights do not follow epochs."""

    def result(self) -> dict[str, tf.Tensor]:
        return {}
