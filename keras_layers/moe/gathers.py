"""Gathers between tokens and slots, forward and backward, for `IndexDispatcher`.

Each gather goes by an integer map; its gradient is a gather by the inverse map.
"""

from typing import Protocol

import tensorflow as tf

from keras_layers._shapes import static_shape
from keras_layers.routing.routing import (
    ExpertChoiceRouting,
    Routing,
    TokenChoiceRouting,
)


class Gathers(Protocol):
    """The two gathers of a routing."""

    def to_slots(self, x: tf.Tensor) -> tf.Tensor:
        """Tokens `[G, S, M]` -> slots `[G, E*C, M]`; empty ones are 0."""

    def to_tokens(self, y: tf.Tensor) -> tf.Tensor:
        """Slots `[G, E*C, M]` -> their weighted sum by token, `[G, S, M]`."""


def gathers_of(routing: Routing) -> Gathers:
    """Returns the gathers of a routing."""
    if isinstance(routing, ExpertChoiceRouting):
        return _ExpertChoiceGathers(routing)
    return _TokenChoiceGathers(routing)


class _TokenChoiceGathers:
    """Gathers where tokens chose experts: two maps, each the inverse of the other."""

    def __init__(self, routing: TokenChoiceRouting):
        self.choice_of_slot, self.slot_of_choice = _maps(routing)
        self.choices = routing.slot.shape[-1]
        self.weight = routing.weight

    def to_slots(self, x: tf.Tensor) -> tf.Tensor:
        @tf.custom_gradient
        def gather(x):
            buffers = _gather(x, _token(self.choice_of_slot, self.choices))

            def gradient(d_buffers):
                rows = _gather(d_buffers, self.slot_of_choice)  # [G, S*K, M]
                return tf.reduce_sum(_split_choices(rows, self.choices), axis=2)

            return buffers, gradient

        return gather(x)

    def to_tokens(self, y: tf.Tensor) -> tf.Tensor:
        @tf.custom_gradient
        def gather(y, weight):
            def rows_of_tokens():
                return _split_choices(_gather(y, self.slot_of_choice), self.choices)

            outputs = tf.einsum(
                "GSK,GSKM->GSM", tf.cast(weight, y.dtype), rows_of_tokens()
            )

            def gradient(d_outputs):
                flat = tf.reshape(weight, tf.shape(self.slot_of_choice))  # [G, S*K]
                slot_weight = _gather(flat[..., None], self.choice_of_slot)
                d_y = _gather(d_outputs, _token(self.choice_of_slot, self.choices))
                d_y = d_y * tf.cast(slot_weight, d_y.dtype)  # [G, E*C, M]
                # Gathered again rather than kept: K rows per token are the largest
                # tensor of the layer after the buffers themselves.
                d_weight = tf.einsum("GSM,GSKM->GSK", d_outputs, rows_of_tokens())
                return d_y, tf.cast(d_weight, weight.dtype)

            return outputs, gradient

        return gather(y, self.weight)


class _ExpertChoiceGathers:
    """Gathers where experts chose tokens: a token may be in any number of slots."""

    def __init__(self, routing: ExpertChoiceRouting):
        groups, experts, capacity = static_shape(routing.token_index)
        flat = [groups, experts * capacity]
        self.token_of_slot = tf.reshape(routing.token_index, flat)  # [G, E*C]
        self.weight = tf.reshape(routing.weight, flat)  # [G, E*C]
        self.chosen = routing.chosen

    def to_slots(self, x: tf.Tensor) -> tf.Tensor:
        @tf.custom_gradient
        def gather(x):
            return _gather(x, self.token_of_slot), self._sum_by_token

        return gather(x)

    def to_tokens(self, y: tf.Tensor) -> tf.Tensor:
        @tf.custom_gradient
        def gather(y, weight):
            outputs = self._sum_by_token(y * tf.cast(weight, y.dtype)[..., None])

            def gradient(d_outputs):
                rows = _gather(d_outputs, self.token_of_slot)  # [G, E*C, M]
                d_weight = tf.einsum("GRM,GRM->GR", rows, y)
                d_y = rows * tf.cast(weight, y.dtype)[..., None]
                return d_y, tf.cast(d_weight, weight.dtype)

            return outputs, gradient

        return gather(y, self.weight)

    def _sum_by_token(self, rows: tf.Tensor) -> tf.Tensor:
        """Sums `[G, E*C, M]` over the slots of each token: `[G, S, M]`.

        Rows are sorted by their tokens. Then each adds the row 1, 2, 4, ... before it
        if that is of the same token, so that the last row of a token holds the sum of
        all, of which there are at most E.
        """
        tokens, experts = static_shape(self.chosen)[1:]
        # Empty slots last.
        key = tf.where(self.token_of_slot < 0, tokens, self.token_of_slot)
        order = tf.argsort(key, axis=-1, stable=True)  # [G, E*C]
        key = tf.gather(key, order, batch_dims=1)
        rows = tf.gather(rows, order, batch_dims=1)
        distance = 1
        while distance < experts:
            same = tf.equal(key[:, distance:], key[:, :-distance])
            before = tf.where(same[..., None], rows[:, :-distance], 0)
            rows = rows + tf.pad(before, [[0, 0], [distance, 0], [0, 0]])
            distance *= 2
        count = tf.reduce_sum(tf.cast(self.chosen, tf.int32), axis=-1)  # [G, S]
        last = tf.cumsum(count, axis=-1) - 1
        return _gather(rows, tf.where(count > 0, last, -1))


def _maps(routing: TokenChoiceRouting) -> tuple[tf.Tensor, tf.Tensor]:
    """Map from each slot to its choice, and the inverse; -1 for none.

    Choice `s * K + k` is the k-th choice of token s; slot `e * C + c` is place c of
    expert e.

    Returns:
        `[G, E*C]` int32 and `[G, S*K]` int32.
    """
    num_experts, capacity = routing.num_experts, routing.capacity
    groups, tokens, choices = static_shape(routing.slot)
    flat = [groups, tokens * choices]
    expert = tf.reshape(routing.expert_index, flat)
    slot = tf.reshape(routing.slot, flat)
    dispatched = tf.reshape(routing.dispatched, flat)
    slot_of_choice = tf.where(dispatched, expert * capacity + slot, -1)

    # The inverse as a product of one-hots: number i + 1 lands at (expert, slot), and
    # 0 stays where nothing lands. A scatter would do, but partitioners and TPUs treat
    # a batched scatter badly; this is a batched product of width S*K, below a
    # thousandth of the experts' FLOPs. Numbers go by their digits (D) in base 256,
    # which is exact even where products round their operands to bfloat16.
    total = routing.slot.shape[1]
    digits = 3 if total is None else max(1, _digits(total * choices))
    base = 256 ** tf.range(digits)
    number = tf.range(1, tokens * choices + 1)
    digit = tf.cast((number[:, None] // base) % 256, tf.float32)[..., None]  # [S*K,D,1]
    expert_hot = tf.one_hot(expert, num_experts, dtype=tf.float32)  # [G, S*K, E]
    slot_hot = tf.one_hot(slot, capacity, dtype=tf.float32)  # [G, S*K, C]
    # Digits multiply the shorter of the two, so that the longer is computed once.
    if isinstance(capacity, int) and capacity < num_experts:
        placed = tf.einsum("GTDC,GTE->GDCE", slot_hot[:, :, None] * digit, expert_hot)
        placed = tf.transpose(placed, [0, 1, 3, 2])
    else:
        placed = tf.einsum("GTDE,GTC->GDEC", expert_hot[:, :, None] * digit, slot_hot)
    placed = tf.cast(placed, tf.int32) * base[:, None, None]  # [G, D, E, C]
    inverse = tf.reduce_sum(placed, axis=1)
    inverse = tf.reshape(inverse, [groups, num_experts * capacity]) - 1
    return inverse, slot_of_choice


def _digits(value: int) -> int:
    """Number of base-256 digits of `value`."""
    return (value.bit_length() + 7) // 8


def _token(choice: tf.Tensor, choices: int) -> tf.Tensor:
    """The token that a choice belongs to; -1 stays -1."""
    return tf.where(choice >= 0, choice // choices, -1)


def _gather(rows: tf.Tensor, index: tf.Tensor) -> tf.Tensor:
    """`rows` `[G, T, M]` at `index` `[G, R]` -> `[G, R, M]`; zeros where it is -1."""
    values = tf.gather(rows, tf.maximum(index, 0), batch_dims=1)
    # Not a product with the mask: an infinite row must not turn others into NaN.
    return tf.where((index >= 0)[..., None], values, tf.zeros([], rows.dtype))


def _split_choices(rows: tf.Tensor, choices: int) -> tf.Tensor:
    """`[G, S*K, M]` -> `[G, S, K, M]`."""
    groups, total, width = static_shape(rows)
    return tf.reshape(rows, [groups, total // choices, choices, width])
