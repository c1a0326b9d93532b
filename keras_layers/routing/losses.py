"""Losses on the router: balance of load, and size of its logits."""

import tensorflow as tf

from keras_layers._padding import masked_mean
from keras_layers.routing.counting import choices_of_real, count_choices


def load_balancing_loss(
    gates: tf.Tensor,
    choices: tf.Tensor,
    mask: tf.Tensor | None = None,
    num_open_experts: int | None = None,
) -> tf.Tensor:
    """Balancing loss of the paper, line 13: mean of `(1/E) sum_e (c_e / S) m_e`.

    The mean is over groups. `c_e` counts choices, including those without a slot; `m_e`
    is the mean gate, through which the gradient flows. Padding counts in none of c_e,
    m_e and S: S is the number of real tokens of the group, and groups without any are
    left out of the mean. At perfect balance it is `1 / E**2`.

    Args:
        gates: `[G, S, E]` float32, each token's summing to 1.
        choices: `[G, S]` int32 the first choices, as in the paper; or `[G, S, K]`, of
            which each counts 1 / K.
        mask: `[G, S]` bool or None.
        num_open_experts: E of the formula, where some are masked; None: all.

    Returns:
        A float32 scalar.
    """
    num_experts = gates.shape[-1]
    if choices.shape.rank == 2:
        choices = choices[..., None]
    if mask is None:
        real = tf.ones_like(gates[..., 0])
    else:
        mask = tf.cast(mask, tf.bool)
        real = tf.cast(mask, tf.float32)
        gates = tf.where(mask[..., None], gates, 0.0)
    size = tf.reduce_sum(real, axis=1)  # [G]
    counted = choices_of_real(choices, mask)
    count = count_choices(choices, counted, num_experts) / choices.shape[-1]  # [G, E]
    gate_sum = tf.reduce_sum(gates, axis=1)  # [G, E]
    per_group = tf.reduce_sum(count * gate_sum, axis=-1)  # [G]
    per_group = per_group / (num_open_experts or num_experts)
    per_group = per_group / tf.square(tf.maximum(size, 1.0))
    groups = tf.reduce_sum(tf.cast(size > 0, tf.float32))
    return tf.reduce_sum(per_group) / tf.maximum(groups, 1.0)


def router_z_loss(logits: tf.Tensor, mask: tf.Tensor | None = None) -> tf.Tensor:
    """Mean over real tokens of `logsumexp(logits)**2` (ST-MoE, equation 5).

    Keeps logits small, where float32 (and more so bfloat16) can resolve gates.

    Args:
        logits: `[G, S, E]` float32.
        mask: `[G, S]` bool or None.

    Returns:
        A float32 scalar.
    """
    per_token = tf.square(tf.reduce_logsumexp(logits, axis=-1))  # [G, S]
    return masked_mean(per_token, mask)
