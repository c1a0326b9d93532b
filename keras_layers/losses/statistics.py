"""Statistics of each token's logits, from which its loss and its metrics follow.

A loss and each metric of a model are called apart, on the same logits. Each statistic
is a function of the same tensors in all of them, so that a compiler computes it once.
Where the vocabulary is split over a mesh it does not: sums over devices are never equal
to it. So the passes over all logits are kept with the logits, for the metrics.
"""

from typing import Any, NamedTuple

import tensorflow as tf

from keras_layers.step_metrics import current_graph

# Keras's `Loss` casts labels to float32, which has all whole numbers up to this one.
_MOST_CLASSES = 2**24


class TokenStatistics(NamedTuple):
    """Statistics of logits `[..., V]` at each position, float32 `[...]` each.

    Attributes:
        log_sum_exp: Logarithm of the sum over V of the exponentials: log Z.
        label_logit: The label's logit. NaN for a label that is not in [0, V).
        mean_logit: Mean of the logits over V, for label smoothing.
        correct: 1 where the label is the first of the largest logits, else 0. It has
            no gradient.
    """

    log_sum_exp: tf.Tensor
    label_logit: tf.Tensor
    mean_logit: tf.Tensor
    correct: tf.Tensor


def token_statistics(labels: Any, logits: Any, reuse: bool = False) -> TokenStatistics:
    """Returns the statistics of logits for labels, in float32 whatever the policy.

    A statistic that is not used costs nothing in a compiled program.

    Args:
        labels: Whole numbers `[...]` or `[..., 1]`, of any dtype, at most 2**24.
        logits: `[..., V]`, of floats.
        reuse: Whether to take what an earlier call computed from the same tensor, as
            metrics do from the loss. There is no gradient then.

    Raises:
        ValueError: when the ranks do not fit, or V is not known or above 2**24.
    """
    given = tf.convert_to_tensor(logits)
    logits = tf.cast(given, tf.float32)
    labels = integer_labels(labels, logits.shape.rank)
    if logits.shape.rank != labels.shape.rank + 1:
        raise ValueError(
            "logits must have one dimension more than labels. Received: shapes "
            f"{logits.shape} and {labels.shape}"
        )
    size = logits.shape[-1]
    if not 0 < (size or 0) <= _MOST_CLASSES:
        raise ValueError(
            f"The last dimension of logits must be known, and at most {_MOST_CLASSES}. "
            f"Received: shape {logits.shape}"
        )
    if reuse:
        logits = tf.stop_gradient(logits)
    log_sum_exp, maximum = _passes(given, logits, reuse)
    known = (labels >= 0) & (labels < size)
    picked = _pick(logits, tf.where(known, labels, 0))
    label_logit = tf.where(known, picked, tf.constant(float("nan")))
    # Of equal logits the first is the prediction.
    earlier = tf.range(size) < labels[..., None]  # [..., V]
    tied = tf.reduce_any((logits == maximum[..., None]) & earlier, axis=-1)
    correct = tf.cast((label_logit == maximum) & ~tied, tf.float32)
    mean_logit = tf.reduce_sum(logits, axis=-1) / size
    return TokenStatistics(log_sum_exp, label_logit, mean_logit, correct)


def integer_labels(labels: Any, rank: int | None) -> tf.Tensor:
    """Returns labels as int32 `[...]`, from `[...]` or `[..., 1]`.

    Args:
        labels: Whole numbers of any dtype.
        rank: The rank of logits.
    """
    # Through float32, as Keras's `Loss` does before: an operation on labels of another
    # origin would be another operation to the compiler, and computed again.
    labels = tf.cast(tf.cast(labels, tf.float32), tf.int32)
    if labels.shape.rank == rank and labels.shape[-1] == 1:
        labels = tf.squeeze(labels, -1)
    return labels


def _passes(
    given: tf.Tensor, logits: tf.Tensor, reuse: bool
) -> tuple[tf.Tensor, tf.Tensor]:
    """Returns log Z and the maximum of logits `[..., V]`: `[...]` each.

    They are kept as an attribute of `given`, the tensor that was passed in.
    """
    kept = getattr(given, "gshard_passes", None)
    # A loss within a loop or a branch computed what others cannot reach.
    if reuse and kept is not None and kept[0] is current_graph():
        return tf.stop_gradient(kept[1]), kept[2]
    maximum = tf.stop_gradient(tf.reduce_max(logits, axis=-1))
    # A maximum of -inf or inf is no shift: inf - inf.
    shift = tf.where(tf.math.is_finite(maximum), maximum, 0.0)
    # Exponentials cost the most on a CPU; their gradient uses them again.
    total = tf.reduce_sum(tf.exp(logits - shift[..., None]), axis=-1)
    log_sum_exp = shift + tf.math.log(total)
    if not reuse:
        given.gshard_passes = (current_graph(), log_sum_exp, maximum)
    return log_sum_exp, maximum


@tf.custom_gradient
def _pick(logits: tf.Tensor, labels: tf.Tensor) -> tuple[tf.Tensor, Any]:
    """The labels' logits, with a gradient that is no scatter.

    A gather reads what it needs, where a sum over a mask would read all logits. A
    scatter needs a pass of its own, which a mask does not: it becomes a part of that
    of the softmax's gradient.
    """

    def gradient(d_picked: tf.Tensor) -> tuple[tf.Tensor, None]:
        chosen = tf.range(logits.shape[-1]) == labels[..., None]  # [..., V]
        return tf.where(chosen, d_picked[..., None], 0.0), None

    return tf.gather(logits, labels, batch_dims=labels.shape.rank), gradient
