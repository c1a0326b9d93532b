"""Experts without drops: as many slots as the fullest expert needs, of a few sizes.

Where no token may be dropped, an expert needs a slot for each token of the group in the
worst case: E / K times what is needed when the load is even. Shapes are static, so a
program has a branch for each of a few capacities, and takes the smallest in which every
token has its slot. For a token or two, the weights of the experts they chose are
gathered, and the others' never read.
"""

from collections.abc import Callable
from typing import Any

import tensorflow as tf

from keras_layers._shapes import sizes
from keras_layers.moe.dispatch import Dispatcher
from keras_layers.routing.assignment import assign
from keras_layers.routing.counting import count_choices
from keras_layers.routing.results import Routing

#: Capacities, in halves of an even load (K * S / E); the last one is all of the group.
HALF_LOADS = (3, 6)
#: The most tokens of a group: to find out what is in each slot costs their square.
GROUP = 1024


def feed(
    tokens: tf.Tensor,
    routing: Routing,
    experts: Callable[..., tf.Tensor],
    dispatcher: Dispatcher,
) -> tf.Tensor:
    """What the experts make of tokens that were routed one by one.

    Args:
        tokens: `[T, 1, M]`, each a group of its own.
        routing: Of these groups.
        experts: An `Experts` layer.
        dispatcher: Moves tokens to its slots.

    Returns:
        `[T, 1, M]`.
    """
    count, choices = sizes(routing.slot)[0], routing.slot.shape[-1]
    if isinstance(count, int) and 0 < 2 * count * choices <= routing.num_experts:
        return _by_gathered_weights(tokens, routing, experts)
    size = tf.clip_by_value(count, 1, GROUP)
    if isinstance(count, int):
        size = min(max(count, 1), GROUP)
    grouped = _in_groups(tokens, size)  # [G, S, M]
    kept = _in_groups(routing.kept, size)  # [G, S, K]
    routing = assign(
        _in_groups(routing.expert_index, size),
        _in_groups(routing.weight, size),
        kept,
        kept,
        routing.num_experts,
        size,
    )

    def with_slots(capacity: Any) -> tf.Tensor:
        plan = routing._replace(capacity=capacity)
        return dispatcher.combine(experts(dispatcher.dispatch(grouped, plan)), plan)

    load = count_choices(routing.expert_index, kept, routing.num_experts)  # [G, E]
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
    tokens: tf.Tensor, routing: Routing, experts: Callable[..., tf.Tensor]
) -> tf.Tensor:
    """The same with each choice's expert as a network of its own."""
    count, _, choices = routing.slot.shape
    rows = tf.repeat(tokens, choices, axis=0)[:, :, None]  # [T*K, 1, 1, M]
    chosen = tf.reshape(routing.expert_index, [count * choices])
    outputs = tf.reshape(experts(rows, chosen=chosen), [count, choices, -1])
    weight = tf.cast(routing.weight, outputs.dtype)  # 0 where not wanted
    return tf.matmul(weight, outputs)  # [T, 1, M]


def _in_groups(x: tf.Tensor, size: int | tf.Tensor) -> tf.Tensor:
    """`[T, 1, .]` -> `[G, S, .]`, the last group filled up with zeros."""
    count, _, width = sizes(x)
    x = tf.pad(x[:, 0], [[0, -count % size], [0, 0]])
    return tf.reshape(x, [-1, size, width])


def _capacities(size: int | tf.Tensor, choices: int, num_experts: int) -> list[Any]:
    """Rising, the last one `size`."""
    found = [
        -(-size * halves * choices // (2 * num_experts))
        for halves in HALF_LOADS
        if halves * choices < 2 * num_experts
    ]
    found = [*found, size]
    return sorted(set(found)) if isinstance(size, int) else found
