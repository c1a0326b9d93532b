"""Top-2 gating: Algorithm 1 of the paper, and the conventions of its relatives."""

from typing import Any

import keras
import tensorflow as tf

from keras_layers._arguments import check_choice, check_positive
from keras_layers.routing.assignment import assign, top_choices, values_at
from keras_layers.routing.losses import load_balancing_loss
from keras_layers.routing.router import Router
from keras_layers.routing.routing import TokenChoiceRouting

POLICIES = ("random", "all", "sampling", "threshold")

#: The arguments that make `Top2Router` route as another library does.
CONVENTIONS: dict[str, dict[str, Any]] = {
    # Algorithm 1 as printed: the defaults.
    "paper": {},
    # lingvo's Top2GatingOnLogits with the arguments that its comments recommend.
    "lingvo": {"drop_frees_slot": True},
    # Mesh TensorFlow's _top_2_gating, training.
    "mesh_tensorflow": {
        "drop_frees_slot": True,
        "capacity_factor": 1.25,
        "eval_capacity_factor": 2.0,
        "min_capacity": 4,
    },
}


def top2_assignment(
    gates: tf.Tensor,
    capacity: int | tf.Tensor,
    mask: tf.Tensor | None = None,
    uniforms: tf.Tensor | None = None,
    drop_frees_slot: bool = False,
    *,
    policy: str = "random",
    threshold: float = 0.5,
    legacy_mtf_behavior: bool = True,
    limit: tf.Tensor | None = None,
) -> TokenChoiceRouting:
    """Assignments of Algorithm 1, for all groups at once.

    All first choices take slots in token order, then all second choices, so a second
    choice never displaces a first one.

    Args:
        gates: `[G, S, E]` float32 softmax outputs.
        capacity: C.
        mask: `[G, S]` bool, False for padding, which takes no slot; or None.
        uniforms: Random numbers in [0, 1) for the policies "random", `[G, S]`, and
            "sampling", `[G, S, E]`. None makes both "all".
        drop_frees_slot: Whether a second choice that the policy drops leaves its slot
            to the next token. Line 22 of the paper as printed says no.
        policy: See `Top2Router`.
        threshold: See `Top2Router`.
        legacy_mtf_behavior: See `Top2Router`.
        limit: `[G]` int32, how many of the C slots may be filled (see
            `TokenChoiceRouting`).

    Returns:
        The routing, K = 2.
    """
    num_experts = gates.shape[-1]
    expert_index = top_choices(gates, 2)  # [G, S, 2]
    if policy == "sampling" and uniforms is not None:
        first = expert_index[..., 0]
        is_first = tf.one_hot(first, num_experts, on_value=True, off_value=False)
        # Gumbel's trick: the largest of log g - log(-log u) is a draw from g.
        noise = -tf.math.log(-tf.math.log(tf.maximum(uniforms, 1e-30)))
        scores = tf.math.log(tf.maximum(gates, 1e-30)) + noise
        scores = tf.where(is_first, -float("inf"), scores)
        second = top_choices(scores, 1)[..., 0]
        expert_index = tf.stack([first, second], axis=-1)
    gate = values_at(gates, expert_index)  # [G, S, 2]
    # Normalized before capacity applies (lines 6 and 16), and not again after a
    # drop. With sampling the second may be next to 0, the first at least 1/E.
    weight = gate / tf.reduce_sum(gate, axis=-1, keepdims=True)
    tested = (weight if legacy_mtf_behavior else gate)[..., 1]

    real = tf.ones_like(tested, tf.bool) if mask is None else tf.cast(mask, tf.bool)
    second_requested = real
    if policy == "random" and uniforms is not None:
        passed = tested > uniforms * threshold
        second_requested = tf.logical_and(real, passed)
    elif policy == "threshold":
        second_requested = tf.logical_and(real, tested > threshold)
    requested = tf.stack([real, second_requested], axis=-1)  # [G, S, 2]
    occupies_slot = tf.stack(
        [real, second_requested if drop_frees_slot else real], axis=-1
    )

    routing = assign(
        expert_index,
        weight if legacy_mtf_behavior else gate,
        requested,
        occupies_slot,
        num_experts,
        capacity,
        limit=limit,
    )
    if legacy_mtf_behavior:
        return routing
    total = tf.reduce_sum(routing.weight, axis=-1, keepdims=True)
    return routing._replace(weight=tf.math.divide_no_nan(routing.weight, total))


@keras.saving.register_keras_serializable(package="gshard_tf")
class Top2Router(Router):
    """Algorithm 1 of the paper: group-level top-2 gating with an auxiliary loss.

    At `training=False` routing is deterministic: the policies "random" and "sampling"
    then take the two largest gates and keep every second choice for which there is a
    slot. The paper does not say what it did at inference.

    Args:
        num_experts: E, at least 2.
        second_expert_policy: Whether a token uses its second expert.
            "random" (the paper): with probability `min(1, g2 / threshold)`, so a
            near-useless one saves its slot for others. "all": always. "sampling": the
            second expert is drawn by its gate from those that are not the first.
            "threshold": if `g2 > threshold`.
        second_expert_threshold: For "random" and "threshold". 0.5 is the paper's
            `2 * g2 > rnd`; g2 of two normalized gates is at most 0.5, so for
            "threshold" choose less (Mesh TensorFlow: 0.2).
        legacy_mtf_behavior: True (the paper): gates are normalized to
            `g1 + g2 = 1` before capacity and policy apply, and not again: a token that
            loses one expert keeps the other's weight below 1. False (lingvo's option
            of that name): policies use the gates as they are, and the
            dispatched ones are normalized in the end: a lone expert has weight 1.
        drop_frees_slot: Whether a second choice that the policy drops leaves its slot
            to the next token. False is the paper's line 22 as printed, which counts it
            all the same; True (lingvo's reading) dispatches a few percent more of the
            second choices at equal capacity.
        aux_loss_scale: "lingvo": E**2 times the paper's value, 1 at perfect balance
            whatever E, so that one coefficient suits all E (as Switch Transformer's
            `E * sum f P`). "paper": 1 / E**2 there.
        **kwargs: Of `Router`.

    Raises:
        ValueError: for an argument out of its range.
    """

    def __init__(
        self,
        num_experts: int,
        capacity_factor: float | str = 2.0,
        second_expert_policy: str = "random",
        second_expert_threshold: float = 0.5,
        legacy_mtf_behavior: bool = True,
        drop_frees_slot: bool = False,
        aux_loss_scale: str = "lingvo",
        **kwargs: Any,
    ):
        check_choice("second_expert_policy", second_expert_policy, POLICIES)
        second_expert_threshold = check_positive(
            "second_expert_threshold", second_expert_threshold
        )
        if second_expert_threshold > 1:
            raise ValueError(
                "second_expert_threshold must be in (0, 1]. Received: "
                f"second_expert_threshold={second_expert_threshold!r}"
            )
        check_choice("aux_loss_scale", aux_loss_scale, ("lingvo", "paper"))
        super().__init__(num_experts, capacity_factor, **kwargs)
        self._check_enough_experts(2)
        self.second_expert_policy = second_expert_policy
        self.second_expert_threshold = second_expert_threshold
        self.legacy_mtf_behavior = bool(legacy_mtf_behavior)
        self.drop_frees_slot = bool(drop_frees_slot)
        self.aux_loss_scale = aux_loss_scale

    @classmethod
    def as_in(cls, convention: str, num_experts: int, **kwargs: Any) -> "Top2Router":
        """A router with another library's defaults (`CONVENTIONS`).

        Args:
            convention: "paper", "lingvo" or "mesh_tensorflow".
            num_experts: E.
            **kwargs: Arguments that go before the convention's.
        """
        check_choice("convention", convention, tuple(CONVENTIONS))
        return cls(num_experts, **{**CONVENTIONS[convention], **kwargs})

    def route(
        self,
        logits: tf.Tensor,
        capacity: int | tf.Tensor,
        mask: tf.Tensor | None,
        training: bool | None,
        limit: tf.Tensor | None = None,
    ) -> tuple[TokenChoiceRouting, tf.Tensor, tf.Tensor]:
        gates = tf.nn.softmax(logits, axis=-1)  # [G, S, E]
        uniforms = None
        if training and self.second_expert_policy == "random":
            uniforms = self.uniform(gates, 2, mask)
        elif training and self.second_expert_policy == "sampling":
            uniforms = self.uniform(gates, 3, mask)
        routing = top2_assignment(
            gates,
            capacity,
            mask,
            uniforms,
            self.drop_frees_slot,
            policy=self.second_expert_policy,
            threshold=self.second_expert_threshold,
            legacy_mtf_behavior=self.legacy_mtf_behavior,
            limit=limit,
        )
        first = routing.expert_index[..., 0]
        aux_loss = load_balancing_loss(gates, first, mask, self.num_open_experts)
        if self.aux_loss_scale == "lingvo":
            aux_loss = aux_loss * float(self.num_open_experts**2)
        return routing, gates, aux_loss

    def get_config(self) -> dict[str, Any]:
        config = super().get_config()
        config.update(
            second_expert_policy=self.second_expert_policy,
            second_expert_threshold=self.second_expert_threshold,
            legacy_mtf_behavior=self.legacy_mtf_behavior,
            drop_frees_slot=self.drop_frees_slot,
            aux_loss_scale=self.aux_loss_scale,
        )
        return config
