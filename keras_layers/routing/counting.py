"""Counts of each expert's choices, without a tensor `[G, S, E]` in memory.

Choices are counted in blocks, and over blocks by a running sum of `[G, T / block, E]`.
XLA lowers a running sum to windows as long as the axis, and sums over a long axis that
is not the last one column by column: with 256 experts a running sum of `[G, T, E]` took
17 times as long, and a plain sum of it ten times.
"""

import tensorflow as tf

from keras_layers._shapes import static_shape

BLOCK = 32


def in_blocks(x: tf.Tensor) -> tf.Tensor:
    """`[G, S, K]` -> `[G, T / block, block]`, T = K*S: first choices come first.

    The order of Algorithm 1: token after token, one choice after the other. The last
    block is filled up with 0, or False.
    """
    groups, tokens, choices = static_shape(x)
    length = choices * tokens
    missing = -length % BLOCK
    x = tf.reshape(tf.transpose(x, [0, 2, 1]), [groups, length])  # [G, T]
    x = tf.pad(x, [[0, 0], [0, missing]])
    return tf.reshape(x, [groups, (length + missing) // BLOCK, BLOCK])


def running_counts(
    expert: tf.Tensor, counted: tf.Tensor, num_experts: int
) -> tf.Tensor:
    """Choices of each expert up to the end of each block: `[G, T / block, E]`.

    Args:
        expert: `[G, T / block, block]` int32.
        counted: `[G, T / block, block]` bool, choices that count.
        num_experts: E.
    """
    chosen = tf.one_hot(expert, num_experts, on_value=True, off_value=False)
    chosen = tf.cast(chosen & counted[..., None], tf.int32)
    return tf.cumsum(tf.reduce_sum(chosen, axis=2), axis=1)


def count_choices(
    expert_index: tf.Tensor, counted: tf.Tensor, num_experts: int
) -> tf.Tensor:
    """Choices of each expert in each group: `[G, E]` float32.

    Args:
        expert_index: `[G, S, K]` int32.
        counted: `[G, S, K]` bool, choices that count.
        num_experts: E.
    """
    running = running_counts(in_blocks(expert_index), in_blocks(counted), num_experts)
    # The last block's, of which there is none for groups of 0 tokens.
    return tf.cast(tf.reduce_sum(running[:, -1:], axis=1), tf.float32)


def choices_of_real(expert_index: tf.Tensor, mask: tf.Tensor | None) -> tf.Tensor:
    """Mask of the choices of real tokens, False for padding's: `[G, S, K]` bool."""
    real = tf.ones_like(expert_index, tf.bool)
    return real if mask is None else real & tf.cast(mask, tf.bool)[..., None]
