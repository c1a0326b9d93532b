"""Slot assignment where tokens choose: positions in the experts' buffers."""

from typing import Any

import tensorflow as tf

from keras_layers._shapes import static_shape
from keras_layers.routing.counting import BLOCK, in_blocks, running_counts
from keras_layers.routing.routing import TokenChoiceRouting


def assign(
    expert_index: tf.Tensor,
    weight: tf.Tensor,
    requested: tf.Tensor,
    occupies_slot: tf.Tensor,
    num_experts: int,
    capacity: Any,
    priority: tf.Tensor | None = None,
    limit: tf.Tensor | None = None,
) -> TokenChoiceRouting:
    """Assigns slots: all first choices, then all second choices, and so on.

    Args:
        expert_index: `[G, S, K]` int32.
        weight: `[G, S, K]` float32.
        requested: `[G, S, K]` bool, choices that are to be dispatched.
        occupies_slot: `[G, S, K]` bool, choices that use up a slot.
        num_experts: E.
        capacity: C.
        priority: `[G, S]` float32: among choices of the same rank, tokens of higher
            priority come first. None: in token order, as in the paper.
        limit: `[G]` int32, how many of the C slots may be filled (see
            `TokenChoiceRouting`).
    """
    if priority is None:
        position = _positions(expert_index, occupies_slot, num_experts)  # [G, S, K]
    else:
        # Batch-prioritized routing (V-MoE, section 4): count in another order.
        # A NaN compares with nothing: it would upset the order of the others.
        priority = tf.where(tf.math.is_nan(priority), 0.0, priority)
        order = tf.argsort(priority, axis=-1, direction="DESCENDING", stable=True)
        place = tf.argsort(order, axis=-1)  # the inverse permutation
        in_order = _positions(
            tf.gather(expert_index, order, batch_dims=1),
            tf.gather(occupies_slot, order, batch_dims=1),
            num_experts,
        )
        position = tf.gather(in_order, place, batch_dims=1)
    room = capacity if limit is None else limit[:, None, None]
    dispatched = tf.logical_and(requested, position < room)
    return TokenChoiceRouting(
        expert_index=expert_index,
        slot=tf.where(dispatched, position, -1),
        weight=tf.where(dispatched, weight, 0.0),
        dispatched=dispatched,
        num_experts=num_experts,
        capacity=capacity,
        limit=limit,
    )


def top_choices(scores: tf.Tensor, choices: int) -> tf.Tensor:
    """The K experts with the largest scores, `[G, S, E]` -> `[G, S, K]` int32.

    K times the maximum, not a `top_k`, which partitioners gather the operand for.
    """
    chosen = []
    for _ in range(choices):
        best = argmax(scores)  # [G, S]
        chosen.append(best)
        hot = tf.one_hot(best, scores.shape[-1], on_value=True, off_value=False)
        scores = tf.where(hot, -float("inf"), scores)
    return tf.stack(chosen, axis=-1)


def values_at(values: tf.Tensor, index: tf.Tensor) -> tf.Tensor:
    """`values` `[G, S, E]` at `index` `[G, S, K]` -> `[G, S, K]`.

    The gradient goes by one-hot: a maximum would split it between equal gates, and
    that of a gather is a scatter.
    """

    @tf.custom_gradient
    def read(values):
        def gradient(d_values):
            size = values.shape[-1]
            return tf.add_n(
                [
                    tf.one_hot(index[..., k], size, dtype=values.dtype)
                    * d_values[..., k : k + 1]
                    for k in range(index.shape[-1])
                ]
            )  # [G, S, E]

        return tf.gather(values, index, batch_dims=2), gradient

    return read(values)


def argmax(x: tf.Tensor) -> tf.Tensor:
    """Index of the maximum along the last axis, the lowest of equals.

    `tf.argmax` does not define which of equal values it takes: devices could differ.
    """
    size = x.shape[-1]
    is_maximum = x >= tf.reduce_max(x, axis=-1, keepdims=True)
    # The last index stands for "none", which only a row of NaN has.
    return tf.reduce_min(tf.where(is_maximum, tf.range(size), size - 1), axis=-1)


def _positions(
    expert_index: tf.Tensor, occupies_slot: tf.Tensor, num_experts: int
) -> tf.Tensor:
    """Number of choices of the same expert before each, `[G, S, K]`.

    Only choices that occupy a slot count. Within a block each choice is compared with
    those before it.
    """
    groups, tokens, choices = static_shape(expert_index)
    expert, occupies_slot = in_blocks(expert_index), in_blocks(occupies_slot)
    same = tf.equal(expert[..., :, None], expert[..., None, :])
    place = tf.range(BLOCK)
    earlier = place[:, None] > place[None, :]
    # [G, T / block, block, block]
    within = same & earlier & occupies_slot[..., None, :]
    within = tf.reduce_sum(tf.cast(within, tf.int32), axis=-1)
    running = running_counts(expert, occupies_slot, num_experts)  # [G, T / block, E]
    before = tf.pad(running, [[0, 0], [1, 0], [0, 0]])[:, :-1]
    position = within + tf.gather(before, expert, batch_dims=2)
    position = tf.reshape(position, [groups, -1])[:, : choices * tokens]
    position = tf.reshape(position, [groups, choices, tokens])  # [G, K, S]
    return tf.transpose(position, [0, 2, 1])  # [G, S, K]
