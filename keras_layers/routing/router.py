"""What all routers have in common: from tokens to logits, and the losses on them."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from gshard_tf import annotate, counter_rng, name_axes
from keras_layers.checks import check_int, check_positive, check_rate
from keras_layers.routing.capacity import check_capacity_factor, expert_capacity
from keras_layers.routing.losses import masked_mean, router_z_loss
from keras_layers.routing.plans import Routing, SlotRouting
from keras_layers.shapes import sizes


class RouterReport(NamedTuple):
    """What a router says of a batch besides the routing; float32 scalars.

    Attributes:
        aux_loss: The balancing loss, 0 where the router has none.
        z_loss: Mean square of the log of the summed exponentials of the logits.
        confidence: Mean over tokens of the largest gate, in [1/E, 1].
    """

    aux_loss: tf.Tensor
    z_loss: tf.Tensor
    confidence: tf.Tensor


class Router(keras.layers.Layer):
    """Base of routers; a subclass says in `route` who goes where.

    Computes in float32 under any dtype policy: positions and counts are not exact in
    bfloat16 above 256, and gates are close to each other.

    Args:
        num_experts: E, at least 2.
        capacity_factor: C = ceil(S * factor / E). Time of the experts and bytes of the
            all-to-all grow with it, dropped tokens shrink; watch the `dropped` metric
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
        masked_experts: Experts that no token goes to, by number.
        seed: Of what is random.
        kernel_initializer: Of the `[M, E]` gating weights.
        kernel_regularizer: Of the same.

    Raises:
        ValueError: for an argument out of its range.
    """

    #: Whether `call` needs `token_ids`.
    uses_token_ids = False
    #: Whether a token's routing depends on later tokens of its group.
    looks_ahead = False
    #: Whether somebody consented to that in a causal decoder.
    allow_causal = False
    #: Whether `seed` says what the router computes, not where random numbers begin:
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
        check_int("num_experts", num_experts, 2)
        check_capacity_factor("capacity_factor", capacity_factor)
        if eval_capacity_factor is not None:
            check_capacity_factor("eval_capacity_factor", eval_capacity_factor)
        check_int("min_capacity", min_capacity, 1)
        check_int("capacity_multiple", capacity_multiple, 1)
        check_rate("jitter", jitter)
        if logit_cap is not None:
            check_positive("logit_cap", logit_cap)
        masked_experts = sorted(set(masked_experts))
        if any(
            isinstance(e, bool) or not isinstance(e, int) or not 0 <= e < num_experts
            for e in masked_experts
        ):
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

    def _check_enough_experts(self, choices: int) -> None:
        left = self.num_experts - len(self.masked_experts)
        if choices > left:
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
        factor = self.capacity_factor
        if not training and self.eval_capacity_factor is not None:
            factor = self.eval_capacity_factor
        return expert_capacity(
            group_size,
            self.num_experts,
            factor,
            self.min_capacity,
            self.capacity_multiple,
        )

    def call(
        self,
        inputs: tf.Tensor,
        mask: tf.Tensor | None = None,
        training: bool | None = None,
    ) -> tuple[Routing | SlotRouting, RouterReport]:
        """Routes `inputs` `[G, S, M]`.

        Args:
            inputs: The tokens.
            mask: `[G, S]` bool, False for padding; or None.
            training: Whether what is random is, and which capacity factor holds.

        Returns:
            The routing, and what to say of it.
        """
        if training and self.jitter:
            noise = self.uniform(inputs, 3)  # [G, S, M]
            inputs = inputs * (1.0 + self.jitter * (2.0 * noise - 1.0))
        # Annotated where it is used, as in the paper: the partitioner would split its
        # gradient by experts, and gather the new weights.
        kernel = annotate(self.kernel, ("embed", None))
        groups, tokens, width = sizes(inputs)
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
        capacity = self.capacity(sizes(inputs)[1], training)
        routing, gates, aux_loss = self.route(logits, capacity, mask, training)
        report = RouterReport(
            aux_loss=aux_loss,
            z_loss=router_z_loss(logits, mask),
            confidence=masked_mean(tf.reduce_max(gates, axis=-1), mask),
        )
        return routing, report

    def route(
        self,
        logits: tf.Tensor,
        capacity: int | tf.Tensor,
        mask: tf.Tensor | None,
        training: bool | None,
    ) -> tuple[Routing | SlotRouting, tf.Tensor, tf.Tensor]:
        """From logits `[G, S, E]` to the routing, gates `[G, S, E]` and aux loss."""
        raise NotImplementedError(f"{type(self).__name__} must define route()")

    def uniform(self, like: tf.Tensor, rank: int) -> tf.Tensor:
        """Random numbers in [0, 1) of the first dimensions of `like`."""
        return counter_rng.uniform(self.seed_generator.next(), sizes(like)[:rank])

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
