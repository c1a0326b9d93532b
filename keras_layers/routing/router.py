"""Base of the routers: from tokens to logits, and the losses on them."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from gshard_tf import annotate, name_axes, random
from keras_layers._arguments import check_int, check_positive, check_rate
from keras_layers._padding import masked_mean, unpadded_positions, zero_padding
from keras_layers._shapes import static_shape
from keras_layers.routing.capacity import (
    capacity_in_force,
    check_capacity_factor,
    expert_capacity,
)
from keras_layers.routing.losses import router_z_loss
from keras_layers.routing.routing import Routing


class RouterStats(NamedTuple):
    """Statistics of a router on a batch, as float32 scalars.

    Attributes:
        aux_loss: The balancing loss, 0 where the router has none.
        z_loss: Mean square of the log of the summed exponentials of the logits.
        confidence: Mean over tokens of the largest gate, in [1/E, 1].
    """

    aux_loss: tf.Tensor
    z_loss: tf.Tensor
    confidence: tf.Tensor


class Router(keras.layers.Layer):
    """Base of routers; a subclass defines `route`, from logits to the routing.

    Computes in float32 under any dtype policy: positions and counts are not exact in
    bfloat16 above 256, and gates are close to each other.

    Args:
        num_experts: E, at least 2.
        capacity_factor: C = ceil(S * factor / E), of the tokens S that are not padding
            and the experts E that are not masked. Time of the experts and bytes of
            the all-to-all grow with it, dropped tokens shrink; watch `dropped`
            of `MoELayer`. "dropless": C = S, so that nothing can be dropped, at
            E / factor times the experts' computation.
        eval_capacity_factor: The same at `training=False`. None: `capacity_factor`.
        min_capacity: Lower bound on C, for small groups.
        capacity_multiple: C is rounded up to a multiple (lingvo's is 4).
        jitter: In training, inputs of the router are multiplied by random numbers in
            `[1 - jitter, 1 + jitter]` (Switch Transformer, section 2.2: 0.01), for
            exploration.
        logit_cap: Logits are `cap * tanh(logits / cap)`, where an unbounded router
            makes training diverge; 30 is common. None: as they are.
        masked_experts: Experts that no token goes to, by number. Capacity, balance and
            metrics are those of a layer of the others.
        seed: Seed of all that is random.
        kernel_initializer: Of the `[M, E]` gating weights.
        kernel_regularizer: Of the same.

    Raises:
        ValueError: for an argument out of its range.
    """

    #: Whether `call` needs `token_ids`.
    uses_token_ids = False
    #: Whether a token's routing is independent of later tokens of its group.
    is_causal = True
    #: Whether a causal decoder accepts a router that is not.
    allow_causal = False
    #: Whether `seed` selects what the router computes, not where random numbers begin:
    #: layers that share a seed then make the same choice.
    seed_is_a_choice = False

    def __init__(
        self,
        num_experts: int,
        capacity_factor: float | str = 2.0,
        eval_capacity_factor: float | str | None = None,
        min_capacity: int = 1,
        capacity_multiple: int = 1,
        jitter: float = 0.0,
        logit_cap: float | None = None,
        masked_experts: Sequence[int] = (),
        seed: int | None = None,
        kernel_initializer: Any = "lecun_uniform",
        kernel_regularizer: Any = None,
        **kwargs: Any,
    ):
        num_experts = check_int("num_experts", num_experts, 2)
        capacity_factor = check_capacity_factor("capacity_factor", capacity_factor)
        if eval_capacity_factor is not None:
            eval_capacity_factor = check_capacity_factor(
                "eval_capacity_factor", eval_capacity_factor
            )
        min_capacity = check_int("min_capacity", min_capacity, 1)
        capacity_multiple = check_int("capacity_multiple", capacity_multiple, 1)
        jitter = check_rate("jitter", jitter)
        if logit_cap is not None:
            logit_cap = check_positive("logit_cap", logit_cap)
        masked_experts = sorted(
            {check_int("masked_experts", e, 0) for e in masked_experts}
        )
        if any(e >= num_experts for e in masked_experts):
            raise ValueError(
                f"masked_experts must be numbers of experts, 0 to {num_experts - 1}. "
                f"Received: masked_experts={masked_experts}"
            )
        # Whatever the surrounding policy: see the class's docstring.
        kwargs["dtype"] = "float32"
        super().__init__(**kwargs)
        self.num_experts = num_experts
        self.capacity_factor = capacity_factor
        self.eval_capacity_factor = eval_capacity_factor
        self.min_capacity = min_capacity
        self.capacity_multiple = capacity_multiple
        self.jitter = jitter
        self.logit_cap = logit_cap
        self.masked_experts = masked_experts
        self.seed = seed
        self.kernel_initializer = keras.initializers.get(kernel_initializer)
        self.kernel_regularizer = keras.regularizers.get(kernel_regularizer)
        self.seed_generator = keras.random.SeedGenerator(seed)
        self.supports_masking = True

    @property
    def num_open_experts(self) -> int:
        """Number of experts that tokens may go to."""
        return self.num_experts - len(self.masked_experts)

    def _check_enough_experts(self, choices: int) -> None:
        if choices > self.num_open_experts:
            raise ValueError(
                "A token cannot choose more experts than there are. Received: "
                f"{choices} choices, num_experts={self.num_experts}, "
                f"masked_experts={self.masked_experts}"
            )

    def build(self, input_shape: Any) -> None:
        self.kernel = self.add_weight(
            name="kernel",
            shape=(input_shape[-1], self.num_experts),
            initializer=self.kernel_initializer,
            regularizer=self.kernel_regularizer,
        )
        # The experts' dimension is not split: every group looks at every expert, and
        # the paper keeps the gating weights on every device.
        name_axes(self.kernel, ("embed", None))

    def capacity(
        self, group_size: int | tf.Tensor, training: bool | None = None
    ) -> int | tf.Tensor:
        """C for groups of `group_size` tokens."""
        return expert_capacity(group_size, *self._capacity_arguments(training))

    def limit(
        self, mask: tf.Tensor | None, training: bool | None = None
    ) -> tf.Tensor | None:
        """`[G]` int32, the slots that may be filled (see `TokenChoiceRouting`).

        Args:
            mask: `[G, S]` bool, False for padding. None: there is no limit but C.
            training: Whether the capacity factor of training is in force.
        """
        if mask is None:
            return None
        return capacity_in_force(mask, *self._capacity_arguments(training))

    def _capacity_arguments(self, training: bool | None) -> tuple[Any, ...]:
        factor = self.capacity_factor
        if not training and self.eval_capacity_factor is not None:
            factor = self.eval_capacity_factor
        return (
            self.num_open_experts,
            factor,
            self.min_capacity,
            self.capacity_multiple,
        )

    def call(
        self,
        inputs: tf.Tensor,
        mask: tf.Tensor | None = None,
        training: bool | None = None,
    ) -> tuple[Routing, RouterStats]:
        """Routes `inputs` `[G, S, M]`.

        Args:
            inputs: The tokens.
            mask: `[G, S]` bool, False for padding; or None.
            training: Whether jitter and random policies, and the capacity factor of
                training, are in force.

        Returns:
            The routing, and its statistics.
        """
        if mask is not None:
            mask = tf.cast(mask, tf.bool)
        inputs = zero_padding(inputs, mask)
        if training and self.jitter:
            noise = self.uniform(inputs, 3, mask)  # [G, S, M]
            inputs = inputs * (1.0 + self.jitter * (2.0 * noise - 1.0))
        # Annotated where it is used, as in the paper: the partitioner would split its
        # gradient by experts, and gather the new weights.
        kernel = annotate(self.kernel, ("embed", None))
        groups, tokens, width = static_shape(inputs)
        # With all tokens (T) in one dimension: for the kernel's gradient XLA's CPU
        # compiler copies [G, S, M] and [G, S, E] into another order, but not these.
        flat = tf.reshape(inputs, [groups * tokens, width])
        logits = tf.einsum("TM,ME->TE", flat, kernel)
        logits = tf.reshape(logits, [groups, tokens, self.num_experts])
        logits = annotate(logits, ("group", None, None))
        if self.logit_cap is not None:
            logits = self.logit_cap * tf.tanh(logits / self.logit_cap)
        if self.masked_experts:
            hot = tf.one_hot(self.masked_experts, self.num_experts)
            logits = tf.where(tf.reduce_any(hot > 0, 0), -1e30, logits)
        # A static S gives a static C, which partitioning needs.
        capacity = self.capacity(static_shape(inputs)[1], training)
        routing, gates, aux_loss = self.route(
            logits, capacity, mask, training, self.limit(mask, training)
        )
        stats = RouterStats(
            aux_loss=aux_loss,
            z_loss=router_z_loss(logits, mask),
            confidence=masked_mean(tf.reduce_max(gates, axis=-1), mask),
        )
        return routing, stats

    def route(
        self,
        logits: tf.Tensor,
        capacity: int | tf.Tensor,
        mask: tf.Tensor | None,
        training: bool | None,
        limit: tf.Tensor | None = None,
    ) -> tuple[Routing, tf.Tensor, tf.Tensor]:
        """Returns the routing, gates `[G, S, E]` and aux loss for logits `[G, S, E]`.

        Args:
            logits: `[G, S, E]` float32.
            capacity: C.
            mask: `[G, S]` bool, False for padding; or None.
            training: Whether random policies are in force.
            limit: `[G]` int32, how many of the C slots may be filled; None: all.
        """
        raise NotImplementedError(f"{type(self).__name__} must define route()")

    def uniform(
        self, like: tf.Tensor, rank: int, mask: tf.Tensor | None = None
    ) -> tf.Tensor:
        """Random numbers in [0, 1) of the first dimensions of `like` `[G, S, ...]`.

        With a mask `[G, S]` a real token's numbers are those that it has without
        padding: they depend on its place among the real tokens of its group.
        """
        numbers = random.uniform(self.seed_generator.next(), static_shape(like)[:rank])
        if mask is None:
            return numbers
        numbers = annotate(numbers, ("group", *[None] * (rank - 1)))
        return tf.gather(numbers, unpadded_positions(mask), batch_dims=1)

    def compute_mask(self, inputs: Any, previous_mask: Any) -> None:
        return None

    def get_config(self) -> dict[str, Any]:
        config = super().get_config()
        config.update(
            num_experts=self.num_experts,
            capacity_factor=self.capacity_factor,
            eval_capacity_factor=self.eval_capacity_factor,
            min_capacity=self.min_capacity,
            capacity_multiple=self.capacity_multiple,
            jitter=self.jitter,
            logit_cap=self.logit_cap,
            masked_experts=list(self.masked_experts),
            seed=self.seed,
            kernel_initializer=keras.initializers.serialize(self.kernel_initializer),
            kernel_regularizer=keras.regularizers.serialize(self.kernel_regularizer),
        )
        return config
