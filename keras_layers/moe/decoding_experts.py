"""Experts without drops: as many slots as the fullest expert needs, of a few sizes.

Where no token may be dropped, an expert needs a slot for each token of the group in the
worst case: E / K times what is needed when the load is even. Shapes are static, so a
program has a branch for each of a few capacities, and takes the smallest in which every
token has its slot. For a token or two, only the weights of the chosen experts are
gathered and read.
"""

from typing import Any

import tensorflow as tf

from keras_layers._shapes import static_shape
from keras_layers.moe.dispatch import Dispatcher
from keras_layers.moe.experts import Experts
from keras_layers.routing.assignment import assign
from keras_layers.routing.counting import count_choices
from keras_layers.routing.routing import TokenChoiceRouting

#: Capacities, in halves of an even load (K * S / E); the last one is all of the group.
HALF_LOADS = (3, 6)
#: Largest group: the map of its slots costs the square of its tokens.
GROUP = 1024


def apply_without_drops(
    tokens: tf.Tensor,
    routing: TokenChoiceRouting,
    experts: Experts,
    dispatcher: Dispatcher,
) -> tf.Tensor:
    """Outputs of the experts for tokens that were routed one by one.

    Args:
        tokens: `[T, 1, M]`, each a group of its own.
        routing: The routing of these groups.
        experts: The experts.
        dispatcher: Moves tokens to its slots.

    Returns:
        `[T, 1, M]`.
    """
    count, choices = static_shape(routing.slot)[0], routing.slot.shape[-1]
    if isinstance(count, int) and 0 < 2 * count * choices <= routing.num_experts:
        return _by_gathered_weights(tokens, routing, experts)
    size = tf.clip_by_value(count, 1, GROUP)
    if isinstance(count, int):
        size = min(max(count, 1), GROUP)
    grouped = _in_groups(tokens, size)  # [G, S, M]
    dispatched = _in_groups(routing.dispatched, size)  # [G, S, K]
    routing = assign(
        _in_groups(routing.expert_index, size),
        _in_groups(routing.weight, size),
        dispatched,
        dispatched,
        routing.num_experts,
        size,
    )

    def with_slots(capacity: Any) -> tf.Tensor:
        slots = routing._replace(capacity=capacity)
        return dispatcher.combine(experts(dispatcher.dispatch(grouped, slots)), slots)

    load = count_choices(
        routing.expert_index, dispatched, routing.num_experts
    )  # [G, E]
    fullest = tf.cast(tf.reduce_max(load), tf.int32)

    def smallest_of(capacities: list[Any]) -> tf.Tensor:
        # Not `tf.switch_case`, which took XLA ten times as long to compile.
        fits, *larger = capacities
        if not larger:
            return with_slots(fits)
        return tf.cond(
            fullest <= fits, lambda: with_slots(fits), lambda: smallest_of(larger)
        )

    outputs = smallest_of(_capacities(size, choices, routing.num_experts))  # [G, S, M]
    outputs = tf.reshape(outputs, [-1, 1, outputs.shape[-1]])[:count]
    outputs.set_shape(tokens.shape)
    return outputs


def _by_gathered_weights(
    tokens: tf.Tensor, routing: TokenChoiceRouting, experts: Experts
) -> tf.Tensor:
    """Equivalent of `apply_without_drops` with each choice's expert by itself."""
    count, _, choices = routing.slot.shape
    rows = tf.repeat(tokens, choices, axis=0)[:, :, None]  # [T*K, 1, 1, M]
    chosen = tf.reshape(routing.expert_index, [count * choices])
    outputs = tf.reshape(experts(rows, chosen=chosen), [count, choices, -1])
    weight = tf.cast(routing.weight, outputs.dtype)  # 0 where not requested
    return tf.matmul(weight, outputs)  # [T, 1, M]


def _in_groups(x: tf.Tensor, size: int | tf.Tensor) -> tf.Tensor:
    """`[T, 1, .]` -> `[G, S, .]`, the last group filled up with zeros."""
    count, _, width = static_shape(x)
    x = tf.pad(x[:, 0], [[0, -count % size], [0, 0]])
    return tf.reshape(x, [-1, size, width])


def _capacities(size: int | tf.Tensor, choices: int, num_experts: int) -> list[Any]:
    """Ascending capacities, the last one `size`."""
    capacities = [
        -(-size * halves * choices // (2 * num_experts))
        for halves in HALF_LOADS
        if halves * choices < 2 * num_experts
    ]
    capacities = [*capacities, size]
    return sorted(set(capacities)) if isinstance(size, int) else capacities
