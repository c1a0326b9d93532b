"""The two results of routing: tokens choose experts, or experts choose tokens.

Dispatchers and metrics take either.
"""

from typing import Any, NamedTuple

import tensorflow as tf

from gshard_tf import annotate
from keras_layers._shapes import static_shape
from keras_layers.routing.counting import choices_of_real, count_choices


class TokenChoiceRouting(NamedTuple):
    """Routing in which each token chose up to K experts, for G groups of S tokens.

    Attributes:
        expert_index: `[G, S, K]` int32, the chosen experts, first choice first. Set
            for every token, also where the choice was not granted.
        slot: `[G, S, K]` int32, place in that expert's buffer, in `[0, C)`; -1 where
            not dispatched.
        weight: `[G, S, K]` float32, weight of the expert's output in the token's; 0
            where not dispatched. The differentiable part.
        dispatched: `[G, S, K]` bool, whether the token is sent to that expert.
        num_experts: E.
        capacity: C, slots per expert and group: an int, or a scalar int32 tensor
            where the group size is not known when the program is traced.
        limit: `[G]` int32, how many of an expert's C slots may be filled: those that
            the group would have without its padding. None: all.
    """

    expert_index: tf.Tensor
    slot: tf.Tensor
    weight: tf.Tensor
    dispatched: tf.Tensor
    num_experts: int
    capacity: Any
    limit: tf.Tensor | None = None

    def any_expert(self) -> tf.Tensor:
        """Returns `[G, S]` bool, True for tokens that go to one expert or more."""
        return tf.reduce_any(self.dispatched, axis=-1)

    def load(self, mask: tf.Tensor | None) -> tf.Tensor:
        """Number of tokens that requested each expert, dispatched or not: `[E]`."""
        counted = choices_of_real(self.expert_index, mask)
        count = count_choices(self.expert_index, counted, self.num_experts)
        # Counted on the devices of the groups, then added up. Without annotations the
        # partitioner may split the count over experts and gather all groups' choices.
        count = annotate(count, ("group", None))
        return annotate(tf.reduce_sum(count, axis=0), (None,))

    def num_filled(self) -> tf.Tensor:
        """Number of slots that hold a token: a float32 scalar."""
        return tf.reduce_sum(tf.cast(self.dispatched, tf.float32))

    def slots(self) -> tf.Tensor:
        """Number of slots that may be filled, of all groups: a float32 scalar."""
        if self.limit is not None:
            return _sum_of_limits(self.limit) * self.num_experts
        groups = tf.cast(tf.shape(self.slot)[0], tf.float32)
        return groups * self.num_experts * tf.cast(self.capacity, tf.float32)


class ExpertChoiceRouting(NamedTuple):
    """Routing in which each of E experts chose C tokens of each group.

    Attributes:
        token_index: `[G, E, C]` int32, which token is in each slot; -1 for none.
        weight: `[G, E, C]` float32, weight of this slot's output in the token's; 0
            where there is no token. The differentiable part.
        chosen: `[G, S, E]` bool, which experts took each token.
        limit: See `TokenChoiceRouting`.
    """

    token_index: tf.Tensor
    weight: tf.Tensor
    chosen: tf.Tensor
    limit: tf.Tensor | None = None

    @property
    def num_experts(self) -> int:
        return self.token_index.shape[1]

    @property
    def capacity(self) -> Any:
        return static_shape(self.token_index)[2]

    def any_expert(self) -> tf.Tensor:
        """Returns `[G, S]` bool, True for tokens that go to one expert or more."""
        return tf.reduce_any(self.chosen, axis=-1)

    def load(self, mask: tf.Tensor | None) -> tf.Tensor:
        """Number of tokens that each expert chose: `[E]` float32."""
        del mask  # padding is never chosen
        chosen = annotate(tf.cast(self.chosen, tf.float32), ("group", None, None))
        return annotate(tf.reduce_sum(chosen, axis=[0, 1]), (None,))

    def num_filled(self) -> tf.Tensor:
        """Number of slots that hold a token: a float32 scalar."""
        return tf.reduce_sum(tf.cast(self.chosen, tf.float32))

    def slots(self) -> tf.Tensor:
        """Number of slots that may be filled, of all groups: a float32 scalar."""
        if self.limit is not None:
            return _sum_of_limits(self.limit) * self.num_experts
        return tf.cast(tf.size(self.token_index), tf.float32)


#: Either result of a router.
Routing = TokenChoiceRouting | ExpertChoiceRouting


def _sum_of_limits(limit: tf.Tensor) -> tf.Tensor:
    return tf.reduce_sum(tf.cast(annotate(limit, ("group",)), tf.float32))
