"""Routers: which token goes to which expert, into which slot, with which weight.

A router is a Keras layer with an attribute `num_experts` whose call takes
`(inputs [G, S, M], mask [G, S] or None, training)` and returns `(Routing, aux_loss)`.
It knows nothing of how tokens are moved (`dispatch.py`) or of what experts compute
(`moe.py`), so another way to choose experts is one more layer of this kind.
"""

import math
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from gshard_tf import annotate, counter_rng, name_axes
from keras_layers.checks import check_choice, check_int, check_positive

# Length of the inner blocks of the running count. Near the square root of common
# group sizes, which makes both levels short: on 2 CPU cores, 4 groups of 1024 tokens
# and 64 experts this took 1.7 ms compiled and 2.8 ms op by op, one plain `tf.cumsum`
# 6.2 and 9.5 ms. XLA lowers a cumulative sum to windows as long as the axis.
_CUMSUM_BLOCK = 32


class Routing(NamedTuple):
    """The router's decision, for G groups of S tokens with up to K experts each.

    Attributes:
        expert_index: `[G, S, K]` int32, the chosen experts, first choice first. Set
            for every token, also where the choice was not granted.
        slot: `[G, S, K]` int32, place in that expert's buffer, in `[0, C)`; -1 where
            not dispatched.
        weight: `[G, S, K]` float32, weight of the expert's output in the token's; 0
            where not dispatched. The differentiable part.
        kept: `[G, S, K]` bool, whether the token is dispatched to that expert.
        num_experts: E.
        capacity: C, slots per expert and group: an int, or a scalar int32 tensor
            where the group size is not known when the program is traced.
    """

    expert_index: tf.Tensor
    slot: tf.Tensor
    weight: tf.Tensor
    kept: tf.Tensor
    num_experts: int
    capacity: Any


def expert_capacity(
    group_size: int | tf.Tensor,
    num_experts: int,
    capacity_factor: float,
    min_capacity: int = 1,
) -> int | tf.Tensor:
    """C, the slots that one expert has for one group: `ceil(S * factor / E)`.

    The paper's C = 2S/E is a factor of 2. Rounded up, so that a group smaller than
    the number of experts still has a slot in each; never more than S, since the
    choices of a token differ and no expert can receive more than each token once.

    Args:
        group_size: S, an int or a scalar int tensor.
        num_experts: E.
        capacity_factor: Slots per token, over all experts.
        min_capacity: Lower bound on C (still at most S).

    Returns:
        An int for an int, else a scalar int32 tensor.
    """
    if isinstance(group_size, int):
        # Rounding first, or 10 * 1.1 / 11 would need two slots.
        share = round(group_size * capacity_factor / num_experts, 6)
        return min(group_size, max(math.ceil(share), min_capacity))
    share = tf.cast(group_size, tf.float64) * (capacity_factor / num_experts)
    rounded = tf.cast(tf.math.ceil(share - 1e-6), tf.int32)
    return tf.minimum(tf.cast(group_size, tf.int32), tf.maximum(rounded, min_capacity))


def top2_assignment(
    gates: tf.Tensor,
    capacity: int | tf.Tensor,
    mask: tf.Tensor | None = None,
    uniforms: tf.Tensor | None = None,
    drop_frees_slot: bool = False,
) -> Routing:
    """The assignments of Algorithm 1, for all groups at once.

    All first choices take slots in token order, then all second choices, so a second
    choice never displaces a first one.

    Args:
        gates: `[G, S, E]` float32 softmax outputs.
        capacity: C.
        mask: `[G, S]` bool, False for padding, which takes no slot; or None.
        uniforms: `[G, S]` float32 in [0, 1): the second choice is kept with
            probability `min(1, 2 * g2)`. None keeps all second choices.
        drop_frees_slot: Whether a second choice lost to the random test leaves its
            slot to the next token. Line 22 of the paper as printed says no.

    Returns:
        The routing, K = 2.
    """
    num_experts = gates.shape[-1]
    # Twice the maximum, not a top_k, which partitioners gather the operand for.
    first = _argmax(gates)  # [G, S]
    is_first = tf.one_hot(first, num_experts, on_value=True, off_value=False)
    others = tf.where(is_first, tf.constant(-1.0, gates.dtype), gates)
    second = _argmax(others)  # [G, S]
    # Read out by one-hot: a maximum would split its gradient between equal gates.
    gate_1 = tf.reduce_sum(gates * _one_hot(first, num_experts, gates.dtype), axis=-1)
    gate_2 = tf.reduce_sum(gates * _one_hot(second, num_experts, gates.dtype), axis=-1)
    # Normalised before capacity is looked at (lines 6 and 16), and not again after a
    # drop. The sum is at least 1/E, so it needs no epsilon.
    total = gate_1 + gate_2
    weight = tf.stack([gate_1 / total, gate_2 / total], axis=-1)  # [G, S, 2]

    real = tf.ones_like(first, tf.bool) if mask is None else tf.cast(mask, tf.bool)
    wanted_2 = real
    if uniforms is not None:
        wanted_2 = tf.logical_and(real, 2.0 * weight[..., 1] > uniforms)
    wanted = tf.stack([real, wanted_2], axis=-1)  # [G, S, 2]
    counted = tf.stack([real, wanted_2 if drop_frees_slot else real], axis=-1)

    expert_index = tf.stack([first, second], axis=-1)  # [G, S, 2]
    position = _positions(expert_index, counted, num_experts)  # [G, S, 2]
    kept = tf.logical_and(wanted, position < capacity)
    return Routing(
        expert_index=expert_index,
        slot=tf.where(kept, position, -1),
        weight=tf.where(kept, weight, 0.0),
        kept=kept,
        num_experts=num_experts,
        capacity=capacity,
    )


def load_balancing_loss(
    gates: tf.Tensor, first_choice: tf.Tensor, mask: tf.Tensor | None = None
) -> tf.Tensor:
    """Line 13: `(1/E) sum_e (c_e / S) m_e` per group, averaged over groups.

    `c_e` counts first choices, including those that found no slot; `m_e` is the mean
    gate, through which the gradient flows. Padding counts in none of c_e, m_e and S:
    S is here the number of real tokens of the group, and groups without any are left
    out of the average. At perfect balance it is `1 / E**2`.

    Args:
        gates: `[G, S, E]` float32.
        first_choice: `[G, S]` int32.
        mask: `[G, S]` bool or None.

    Returns:
        A float32 scalar.
    """
    num_experts = gates.shape[-1]
    chosen = _one_hot(first_choice, num_experts, tf.float32)  # [G, S, E]
    if mask is None:
        real = tf.ones_like(first_choice, tf.float32)
    else:
        mask = tf.cast(mask, tf.bool)
        real = tf.cast(mask, tf.float32)
        chosen = chosen * real[..., None]
        gates = tf.where(mask[..., None], gates, 0.0)
    size = tf.reduce_sum(real, axis=1)  # [G]
    count = tf.reduce_sum(chosen, axis=1)  # [G, E]
    gate_sum = tf.reduce_sum(gates, axis=1)  # [G, E]
    per_group = tf.reduce_sum(count * gate_sum, axis=-1) / num_experts  # [G]
    per_group = per_group / tf.square(tf.maximum(size, 1.0))
    groups = tf.reduce_sum(tf.cast(size > 0, tf.float32))
    return tf.reduce_sum(per_group) / tf.maximum(groups, 1.0)


@keras.saving.register_keras_serializable(package="gshard_tf")
class Top2Router(keras.layers.Layer):
    """Algorithm 1 of the paper: group-level top-2 gating with an auxiliary loss.

    Computes in float32 under any dtype policy: positions and counts are not exact in
    bfloat16 above 256, and gates are close to each other.

    At `training=False` routing is deterministic: the policy "random" then keeps every
    second choice for which there is a slot. The paper does not say what it did at
    inference.

    Args:
        num_experts: E, at least 2.
        capacity_factor: C = ceil(S * factor / E). 2.0 is the paper's C = 2S/E: room
            for both choices of every token at perfect balance. Lower (1.25) saves
            expert FLOPs and all-to-all bytes in proportion and drops more tokens;
            watch the `dropped` metric of `MoELayer`.
        eval_capacity_factor: The same at `training=False`. None: `capacity_factor`.
        min_capacity: Lower bound on C, for small groups.
        second_expert_policy: "random" (the paper): the second expert is used with
            probability `min(1, 2 * g2)`, so a near-useless one saves its slot for
            others. "all": always used.
        drop_frees_slot: Whether a randomly dropped second choice leaves its slot to
            the next token. False is the paper's line 22 as printed, which counts it
            all the same; True (lingvo's reading) dispatches a few percent more of the
            second choices at equal capacity.
        aux_loss_scale: "lingvo": E**2 times the paper's value, 1 at perfect balance
            whatever E, so that one coefficient suits all E. "paper": 1 / E**2 there.
        seed: Seed of the random policy.
        kernel_initializer: Of the `[M, E]` gating weights.
        kernel_regularizer: Of the same.

    Raises:
        ValueError: for an argument out of its range.
    """

    def __init__(
        self,
        num_experts: int,
        capacity_factor: float = 2.0,
        eval_capacity_factor: float | None = None,
        min_capacity: int = 1,
        second_expert_policy: str = "random",
        drop_frees_slot: bool = False,
        aux_loss_scale: str = "lingvo",
        seed: int | None = None,
        kernel_initializer: Any = "lecun_uniform",
        kernel_regularizer: Any = None,
        **kwargs: Any,
    ):
        check_int("num_experts", num_experts, 2)
        check_positive("capacity_factor", capacity_factor)
        if eval_capacity_factor is not None:
            check_positive("eval_capacity_factor", eval_capacity_factor)
        check_int("min_capacity", min_capacity, 1)
        check_choice("second_expert_policy", second_expert_policy, ("random", "all"))
        check_choice("aux_loss_scale", aux_loss_scale, ("lingvo", "paper"))
        # Whatever the surrounding policy: see the class's docstring.
        kwargs["dtype"] = "float32"
        super().__init__(**kwargs)
        self.num_experts = num_experts
        self.capacity_factor = capacity_factor
        self.eval_capacity_factor = eval_capacity_factor
        self.min_capacity = min_capacity
        self.second_expert_policy = second_expert_policy
        self.drop_frees_slot = bool(drop_frees_slot)
        self.aux_loss_scale = aux_loss_scale
        self.seed = seed
        self.kernel_initializer = keras.initializers.get(kernel_initializer)
        self.kernel_regularizer = keras.regularizers.get(kernel_regularizer)
        self.seed_generator = keras.random.SeedGenerator(seed)
        self.supports_masking = True

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
        return expert_capacity(group_size, self.num_experts, factor, self.min_capacity)

    def call(
        self,
        inputs: tf.Tensor,
        mask: tf.Tensor | None = None,
        training: bool | None = None,
    ) -> tuple[Routing, tf.Tensor]:
        """Routes `inputs` `[G, S, M]`.

        Returns:
            The routing, and the auxiliary loss as a float32 scalar.
        """
        logits = tf.einsum("GSM,ME->GSE", inputs, self.kernel)
        logits = annotate(logits, ("group", None, None))
        gates = tf.nn.softmax(logits, axis=-1)  # [G, S, E]
        # A static S gives a static C, which partitioning needs.
        group_size = inputs.shape[1]
        if group_size is None:
            group_size = tf.shape(inputs)[1]
        uniforms = None
        if training and self.second_expert_policy == "random":
            shape = [
                static if static is not None else tf.shape(inputs)[i]
                for i, static in enumerate(inputs.shape[:2])
            ]
            uniforms = counter_rng.uniform(self.seed_generator.next(), shape)
        routing = top2_assignment(
            gates,
            self.capacity(group_size, training),
            mask,
            uniforms,
            self.drop_frees_slot,
        )
        aux_loss = load_balancing_loss(gates, routing.expert_index[..., 0], mask)
        if self.aux_loss_scale == "lingvo":
            aux_loss = aux_loss * float(self.num_experts**2)
        return routing, aux_loss

    def compute_mask(self, inputs: Any, previous_mask: Any) -> None:
        return None

    def get_config(self) -> dict[str, Any]:
        config = super().get_config()
        config.update(
            num_experts=self.num_experts,
            capacity_factor=self.capacity_factor,
            eval_capacity_factor=self.eval_capacity_factor,
            min_capacity=self.min_capacity,
            second_expert_policy=self.second_expert_policy,
            drop_frees_slot=self.drop_frees_slot,
            aux_loss_scale=self.aux_loss_scale,
            seed=self.seed,
            kernel_initializer=keras.initializers.serialize(self.kernel_initializer),
            kernel_regularizer=keras.regularizers.serialize(self.kernel_regularizer),
        )
        return config


def _positions(
    expert_index: tf.Tensor, counted: tf.Tensor, num_experts: int
) -> tf.Tensor:
    """How many counted choices of the same expert come before each: `[G, S, K]`."""
    choices = expert_index.shape[-1]
    tokens = tf.shape(expert_index)[1]
    if expert_index.shape[1] is not None:
        tokens = expert_index.shape[1]
    # The order of Algorithm 1: token after token, one choice after the other.
    in_order = tf.transpose(expert_index, [0, 2, 1])  # [G, K, S]
    in_order = tf.reshape(in_order, [-1, choices * tokens])  # [G, K*S]
    counted = tf.reshape(tf.transpose(counted, [0, 2, 1]), [-1, choices * tokens])
    taken = _one_hot(in_order, num_experts, tf.int32)  # [G, K*S, E]
    before = _exclusive_cumsum(taken * tf.cast(counted, tf.int32)[..., None])
    position = tf.reduce_sum(before * taken, axis=-1)  # [G, K*S]
    position = tf.reshape(position, [-1, choices, tokens])  # [G, K, S]
    return tf.transpose(position, [0, 2, 1])  # [G, S, K]


def _exclusive_cumsum(x: tf.Tensor) -> tf.Tensor:
    """Exclusive running sum of `x` `[G, T, E]` along T, in two levels."""
    length, width = x.shape[1:]
    if length is None or length <= _CUMSUM_BLOCK:
        return tf.cumsum(x, axis=1, exclusive=True)
    blocks = -(-length // _CUMSUM_BLOCK)
    padded = tf.pad(x, [[0, 0], [0, blocks * _CUMSUM_BLOCK - length], [0, 0]])
    padded = tf.reshape(padded, [-1, blocks, _CUMSUM_BLOCK, width])
    before_block = tf.cumsum(tf.reduce_sum(padded, axis=2), axis=1, exclusive=True)
    within = tf.cumsum(padded, axis=2, exclusive=True)
    total = tf.reshape(
        within + before_block[:, :, None, :], [-1, blocks * _CUMSUM_BLOCK, width]
    )
    return total[:, :length]


def _argmax(x: tf.Tensor) -> tf.Tensor:
    """Index of the maximum along the last axis, the lowest of equals.

    `tf.argmax` leaves open which of equal values it takes, so devices could differ.
    """
    size = x.shape[-1]
    is_maximum = x >= tf.reduce_max(x, axis=-1, keepdims=True)
    # The last index stands for "none", which only a row of NaN has.
    return tf.reduce_min(tf.where(is_maximum, tf.range(size), size - 1), axis=-1)


def _one_hot(indices: tf.Tensor, depth: int, dtype: tf.DType) -> tf.Tensor:
    return tf.one_hot(indices, depth, dtype=dtype)
