"""Dispatchers: move tokens to the experts' buffers and back.

Both annotate the same pair of layouts, and that pair is the all-to-all: the buffers
are made group by group (split over groups) and handed to the experts split over
experts. Forward this costs one all-to-all each way, and one each way backward.
"""

from typing import Protocol

import tensorflow as tf

from gshard_tf import annotate
from keras_layers.routing import Routing


class Dispatcher(Protocol):
    """What `MoELayer` asks of a dispatcher."""

    def dispatch(self, inputs: tf.Tensor, routing: Routing) -> tf.Tensor:
        """`[G, S, M]` -> the experts' buffers `[E, G, C, M]`; empty slots are 0."""

    def combine(self, expert_outputs: tf.Tensor, routing: Routing) -> tf.Tensor:
        """`[E, G, C, M]` -> the weighted sum for each token, `[G, S, M]`."""


class EinsumDispatcher:
    """Dispatch and combine as products with one-hot tensors, as in the paper.

    Algorithm 2 of the paper. The tensors `[G, S, E, C]` hold 2S numbers per token
    and the products cost S / H of the experts' own FLOPs (at a capacity factor of 2),
    so keep groups small. It is here as the form that the paper measured, and as a
    check on `IndexDispatcher`.
    """

    def dispatch(self, inputs: tf.Tensor, routing: Routing) -> tf.Tensor:
        mask = self._one_hots(routing, tf.cast(routing.kept, inputs.dtype))
        buffers = tf.einsum("GSEC,GSM->GECM", mask, inputs)
        return _to_experts(buffers)

    def combine(self, expert_outputs: tf.Tensor, routing: Routing) -> tf.Tensor:
        buffers = _to_groups(expert_outputs)  # [G, E, C, M]
        combine = self._one_hots(routing, tf.cast(routing.weight, buffers.dtype))
        outputs = tf.einsum("GSEC,GECM->GSM", combine, buffers)
        return annotate(outputs, ("group", None, "embed"))

    @staticmethod
    def _one_hots(routing: Routing, values: tf.Tensor) -> tf.Tensor:
        """`values` `[G, S, K]` put at (expert, slot): `[G, S, E, C]`."""
        dtype = values.dtype
        expert = tf.one_hot(routing.expert_index, routing.num_experts, dtype=dtype)
        # A slot of -1 is a row of zeros.
        slot = tf.one_hot(routing.slot, routing.capacity, dtype=dtype)
        expert = expert * values[..., None]  # [G, S, K, E]
        return tf.einsum("GSKE,GSKC->GSEC", expert, slot)


class IndexDispatcher:
    """Dispatch and combine by index: activations move once, by gathers.

    Two small integer maps per group say which choice sits in each slot and in which
    slot each choice sits. They are each other's inverse, so the gradient of gathering
    by one is gathering by the other: no activation is ever scattered, which
    partitions well and has no unpredictable order of additions.
    """

    def dispatch(self, inputs: tf.Tensor, routing: Routing) -> tf.Tensor:
        choice_of_slot, slot_of_choice = _maps(routing)
        choices = routing.slot.shape[-1]

        @tf.custom_gradient
        def move(x):
            buffers = _gather(x, _token(choice_of_slot, choices))  # [G, E*C, M]

            def gradient(d_buffers):
                rows = _gather(d_buffers, slot_of_choice)  # [G, S*K, M]
                return tf.reduce_sum(_split_choices(rows, choices), axis=2)

            return buffers, gradient

        buffers = move(inputs)
        groups, width = tf.shape(inputs)[0], inputs.shape[-1]
        buffers = tf.reshape(
            buffers, [groups, routing.num_experts, routing.capacity, width]
        )
        return _to_experts(buffers)

    def combine(self, expert_outputs: tf.Tensor, routing: Routing) -> tf.Tensor:
        choice_of_slot, slot_of_choice = _maps(routing)
        choices = routing.slot.shape[-1]
        buffers = _to_groups(expert_outputs)  # [G, E, C, M]
        shape = tf.shape(buffers)
        # The width by number: -1 would be undefined for an empty batch.
        width = buffers.shape[-1]
        buffers = tf.reshape(buffers, [shape[0], shape[1] * shape[2], width])

        @tf.custom_gradient
        def move(y, weight):
            def rows_of_tokens():
                return _split_choices(_gather(y, slot_of_choice), choices)

            outputs = tf.einsum(
                "GSK,GSKM->GSM", tf.cast(weight, y.dtype), rows_of_tokens()
            )

            def gradient(d_outputs):
                flat = tf.reshape(weight, tf.shape(slot_of_choice))  # [G, S*K]
                slot_weight = _gather(flat[..., None], choice_of_slot)  # [G, E*C, 1]
                d_y = _gather(d_outputs, _token(choice_of_slot, choices))
                d_y = d_y * tf.cast(slot_weight, d_y.dtype)
                # Gathered again rather than kept: K rows per token are the largest
                # tensor of the layer after the buffers themselves.
                d_weight = tf.einsum("GSM,GSKM->GSK", d_outputs, rows_of_tokens())
                return d_y, tf.cast(d_weight, weight.dtype)

            return outputs, gradient

        outputs = move(buffers, routing.weight)
        return annotate(outputs, ("group", None, "embed"))


def _to_experts(buffers: tf.Tensor) -> tf.Tensor:
    """`[G, E, C, M]` split over groups -> `[E, G, C, M]` split over experts."""
    buffers = annotate(buffers, ("group", None, None, "embed"))
    return annotate(
        tf.transpose(buffers, [1, 0, 2, 3]), ("expert", None, None, "embed")
    )


def _to_groups(buffers: tf.Tensor) -> tf.Tensor:
    """The way back: `[E, G, C, M]` -> `[G, E, C, M]`."""
    buffers = annotate(buffers, ("expert", None, None, "embed"))
    return annotate(tf.transpose(buffers, [1, 0, 2, 3]), ("group", None, None, "embed"))


def _maps(routing: Routing) -> tuple[tf.Tensor, tf.Tensor]:
    """Which choice is in each slot, and the inverse; -1 for none.

    Choice `s * K + k` is the k-th choice of token s; slot `e * C + c` is place c of
    expert e.

    Returns:
        `[G, E*C]` int32 and `[G, S*K]` int32.
    """
    num_experts, capacity = routing.num_experts, routing.capacity
    groups, tokens, choices = _sizes(routing.slot)
    flat = [groups, tokens * choices]
    expert = tf.reshape(routing.expert_index, flat)
    slot = tf.reshape(routing.slot, flat)
    kept = tf.reshape(routing.kept, flat)
    slot_of_choice = tf.where(kept, expert * capacity + slot, -1)

    # The inverse as a product of one-hots: number i + 1 lands at (expert, slot), and
    # 0 stays where nothing lands. A scatter would do, but partitioners and TPUs treat
    # a batched scatter badly; this is a batched product of width S*K, below a
    # thousandth of the experts' FLOPs. Numbers go digit by digit in base 256, which
    # is exact even where products round their operands to bfloat16.
    total = routing.slot.shape[1]
    digits = 3 if total is None else max(1, _digits(total * choices))
    number = tf.range(1, tokens * choices + 1)
    expert_hot = tf.one_hot(expert, num_experts, dtype=tf.float32)  # [G, S*K, E]
    slot_hot = tf.one_hot(slot, capacity, dtype=tf.float32)  # [G, S*K, C]
    inverse = tf.zeros([], tf.int32)
    for digit in reversed(range(digits)):
        value = tf.cast((number // 256**digit) % 256, tf.float32)
        placed = tf.einsum("GTE,GTC->GEC", expert_hot * value[None, :, None], slot_hot)
        inverse = inverse * 256 + tf.cast(placed, tf.int32)
    inverse = tf.reshape(inverse, [groups, num_experts * capacity]) - 1
    return inverse, slot_of_choice


def _digits(value: int) -> int:
    """How many base-256 digits `value` has."""
    return (value.bit_length() + 7) // 8


def _sizes(x: tf.Tensor) -> list:
    """The dimensions of `x`, as ints where they are known."""
    dynamic = tf.shape(x)
    return [dynamic[i] if n is None else n for i, n in enumerate(x.shape)]


def _token(choice: tf.Tensor, choices: int) -> tf.Tensor:
    """The token that a choice belongs to; -1 stays -1."""
    return tf.where(choice >= 0, choice // choices, -1)


def _gather(rows: tf.Tensor, index: tf.Tensor) -> tf.Tensor:
    """`rows` `[G, T, M]` at `index` `[G, R]` -> `[G, R, M]`; zeros where it is -1."""
    found = tf.gather(rows, tf.maximum(index, 0), batch_dims=1)
    # Not a product with the mask: an infinite row must not turn others into NaN.
    return tf.where((index >= 0)[..., None], found, tf.zeros([], rows.dtype))


def _split_choices(rows: tf.Tensor, choices: int) -> tf.Tensor:
    """`[G, S*K, M]` -> `[G, S, K, M]`."""
    groups, total, width = _sizes(rows)
    return tf.reshape(rows, [groups, total // choices, choices, width])
