"""Statistics of each token's logits, from which its loss and its metrics follow.

A loss and each metric of a model are called apart, on the same logits. Where all of
them take the same functions of the same tensors, the compiler computes those once.
"""

from typing import Any, NamedTuple

import tensorflow as tf

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


def token_statistics(labels: Any, logits: Any) -> TokenStatistics:
    """Returns the statistics of logits for labels, in float32 whatever the policy.

    Each is a function of the logits alone or of them and the labels, so a statistic
    that is not used costs nothing in a compiled program, and one that is used twice
    costs once. The gradient of all of them is one pass over the logits.

    Args:
        labels: Whole numbers `[...]` or `[..., 1]`, of any dtype, at most 2**24.
        logits: `[..., V]`, of floats.

    Raises:
        ValueError: when the ranks do not fit, or V is not known or above 2**24.
    """
    logits = tf.cast(tf.convert_to_tensor(logits), tf.float32)
    labels = integer_labels(labels, logits.shape.rank)
    if logits.shape.rank != labels.shape.rank + 1:
        raise ValueError(
            "logits must have one dimension more than labels. Received: shapes "
            f"{logits.shape} and {labels.shape}"
        )
    if not 0 < (logits.shape[-1] or 0) <= _MOST_CLASSES:
        raise ValueError(
            f"The last dimension of logits must be known, and at most {_MOST_CLASSES}. "
            f"Received: shape {logits.shape}"
        )
    return TokenStatistics(*_statistics(logits, labels))


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


@tf.custom_gradient
def _statistics(logits: tf.Tensor, labels: tf.Tensor) -> tuple[list[tf.Tensor], Any]:
    size = logits.shape[-1]
    classes = tf.range(size)  # [V]
    known = (labels >= 0) & (labels < size)
    maximum = tf.reduce_max(logits, axis=-1)  # [...]
    # A maximum of -inf or inf is no shift: inf - inf.
    shift = tf.where(tf.math.is_finite(maximum), maximum, 0.0)
    total = tf.reduce_sum(tf.exp(logits - shift[..., None]), axis=-1)
    log_sum_exp = shift + tf.math.log(total)
    # Not a pass over the logits, unlike the sum of those chosen by a mask.
    picked = tf.gather(logits, tf.where(known, labels, 0), batch_dims=labels.shape.rank)
    nan = tf.constant(float("nan"))
    label_logit = tf.where(known, picked, nan)
    mean_logit = tf.reduce_sum(logits, axis=-1) / size
    earlier = classes < labels[..., None]  # [..., V]
    tied = tf.reduce_any((logits == maximum[..., None]) & earlier, axis=-1)
    correct = tf.cast((label_logit == maximum) & ~tied, tf.float32)

    def gradient(d_log_sum_exp, d_label, d_mean, _):
        softmax = tf.exp(logits - log_sum_exp[..., None])
        target = tf.where(classes == labels[..., None], d_label[..., None], 0.0)
        d_logits = d_log_sum_exp[..., None] * softmax + target
        return d_logits + d_mean[..., None] / size, None

    return [log_sum_exp, label_logit, mean_logit, correct], gradient
