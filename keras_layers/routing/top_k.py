"""Top-k routing: Switch (k = 1), Mixtral, Qwen, DeepSeek and their like."""

from typing import Any

import keras
import tensorflow as tf

from gshard_tf import accumulated_batches
from keras_layers._arguments import (
    check_choice,
    check_coefficient,
    check_int,
    check_positive,
)
from keras_layers.routing.assignment import (
    assign,
    top_choices,
    values_at,
)
from keras_layers.routing.balancing import (
    LoadSoFar,
    bias_direction,
    calls_per_batch,
    sum_over_replicas,
)
from keras_layers.routing.counting import choices_of_real
from keras_layers.routing.expert_groups import check_expert_groups, within_best_groups
from keras_layers.routing.losses import load_balancing_loss
from keras_layers.routing.router import Router
from keras_layers.routing.routing import TokenChoiceRouting


@keras.saving.register_keras_serializable(package="gshard_tf")
class TopKRouter(Router):
    """Each token goes to the k experts with the largest scores.

    `k=1, normalize_weights=False` is the Switch Transformer's router (arXiv
    2101.03961), `k=2` Mixtral's and `k=8, scores="sigmoid", bias_update_rate=1e-3`
    in the manner of DeepSeek-V3 (arXiv 2412.19437), each with a capacity. Whole layers
    like those of these models: `MoELayer.as_in`.

    Args:
        num_experts: E, at least 2.
        k: K, experts per token. More cost in proportion.
        capacity_factor: C = ceil(S * factor / E). None: K, room for every choice at
            perfect balance.
        scores: "softmax" over experts, or "sigmoid" of each logit.
        normalize_weights: Whether the weights of a token's K experts are scaled to sum
            to 1, before capacity applies. None: if K > 1. With K = 1 keep the
            gate itself, or the router would have no gradient.
        batch_prioritized: Whether tokens with larger scores get their slots first
            (V-MoE, arXiv 2106.05974), so that a small capacity drops the least
            important ones. The order then depends on later tokens of the group: not
            for a causal decoder.
        bias_update_rate: Balancing without a loss (DeepSeek-V3): each training step
            adds this to the bias of experts with less than their share of the batch
            and takes it from the others. The bias counts in choosing, not in the
            weights. 0: no bias; 0.001 is the paper's. Set MoELayer's `aux_loss_coef`
            to 0 or to something small with it. The batch is that of all replicas;
            masked experts have no share; the bias of a layer with `trainable=False`
            stays as it is.
        bias_update_every: Over how many calls with `training=True` the load is summed
            up before the bias moves. None: as many as the `optimizer` of the Keras
            model that is being called accumulates gradients over, so that the bias
            moves once for each update of the weights; 1 where there is none, as in a
            custom loop: pass there how many it accumulates.
        score_bias: Whether there is such a bias. None: where it moves. True with a rate
            of 0 is for weights that have one, which then stays as it is.
        weight_scale: A factor of the weights, after they are normalized (DeepSeek-V3:
            2.5).
        num_expert_groups: Number of groups of neighboring experts, of which a token
            uses few (DeepSeek's device- or node-limited routing). Divides E; more than
            1 goes with no `masked_experts`.
        expert_groups_per_token: Number of groups that a token's experts lie in at
            most. None: all.
        expert_group_score: Score of a group for a token: "max", that of its best
            expert (DeepSeek-V2), or "top2", the sum of its best two (DeepSeek-V3).
        **kwargs: Of `Router`.

    The balancing loss is `E * sum_e f_e P_e`: 1 at perfect balance. `f_e` is the share
    of all choices, `P_e` the mean score (sigmoid scores scaled to sum to 1).

    Raises:
        ValueError: for an argument out of its range, such as k above E.
    """

    def __init__(
        self,
        num_experts: int,
        k: int = 2,
        capacity_factor: float | str | None = None,
        scores: str = "softmax",
        normalize_weights: bool | None = None,
        batch_prioritized: bool = False,
        bias_update_rate: float = 0.0,
        bias_update_every: int | None = None,
        score_bias: bool | None = None,
        weight_scale: float = 1.0,
        num_expert_groups: int = 1,
        expert_groups_per_token: int | None = None,
        expert_group_score: str = "max",
        **kwargs: Any,
    ):
        k = check_int("k", k, 1)
        check_choice("scores", scores, ("softmax", "sigmoid"))
        bias_update_rate = check_coefficient("bias_update_rate", bias_update_rate)
        if bias_update_every is not None:
            bias_update_every = check_int("bias_update_every", bias_update_every, 1)
        score_bias = bool(bias_update_rate) if score_bias is None else bool(score_bias)
        if bias_update_rate and not score_bias:
            raise ValueError(
                "bias_update_rate must be 0 without a score_bias. Received: "
                f"bias_update_rate={bias_update_rate}, score_bias=False"
            )
        weight_scale = check_positive("weight_scale", weight_scale)
        if capacity_factor is None:
            capacity_factor = float(k)
        super().__init__(num_experts, capacity_factor, **kwargs)
        self._check_enough_experts(k)
        self.num_expert_groups, self.expert_groups_per_token = check_expert_groups(
            self.num_experts,
            k,
            num_expert_groups,
            expert_groups_per_token,
            expert_group_score,
        )
        if self.masked_experts and self.num_expert_groups > 1:
            raise ValueError(
                "masked_experts must be empty with num_expert_groups > 1. Received: "
                f"masked_experts={self.masked_experts}, "
                f"num_expert_groups={self.num_expert_groups}"
            )
        self.expert_group_score = expert_group_score
        self.score_bias = score_bias
        self.weight_scale = weight_scale
        self.k = k
        self.scores = scores
        self.normalize_weights = (
            k > 1 if normalize_weights is None else bool(normalize_weights)
        )
        self.batch_prioritized = bool(batch_prioritized)
        self.is_causal = not self.batch_prioritized
        self.bias_update_rate = bias_update_rate
        self.bias_update_every = bias_update_every
        self.bias: Any = None  # a weight, where there is a bias and it is built

    def build(self, input_shape: Any) -> None:
        super().build(input_shape)
        if self.score_bias:
            self.bias = self.add_weight(
                name="bias",
                shape=(self.num_experts,),
                initializer="zeros",
                trainable=False,
            )
        if self.bias_update_rate:
            self.load_so_far = LoadSoFar(self.num_experts)

    def route(
        self,
        logits: tf.Tensor,
        capacity: int | tf.Tensor,
        mask: tf.Tensor | None,
        training: bool | None,
        limit: tf.Tensor | None = None,
    ) -> tuple[TokenChoiceRouting, tf.Tensor, tf.Tensor]:
        if self.scores == "softmax":
            scores = gates = tf.nn.softmax(logits, axis=-1)  # [G, S, E]
        else:
            scores = tf.sigmoid(logits)
            # At most E; a masked expert's score is 0.
            total = tf.reduce_sum(scores, axis=-1, keepdims=True)
            gates = tf.math.divide_no_nan(scores, total)
        ranked = tf.stop_gradient(scores)
        if self.bias is not None:
            ranked = ranked + self.bias
            if self.masked_experts:
                ranked = tf.where(logits > -1e29, ranked, -float("inf"))
        if self.expert_groups_per_token < self.num_expert_groups:
            ranked = within_best_groups(
                ranked,
                self.num_expert_groups,
                self.expert_groups_per_token,
                self.expert_group_score,
            )
        expert_index = top_choices(ranked, self.k)  # [G, S, K]
        weight = values_at(scores, expert_index)  # [G, S, K]
        if self.normalize_weights:
            total = tf.reduce_sum(weight, axis=-1, keepdims=True)
            weight = tf.math.divide_no_nan(weight, total)
        weight = weight * self.weight_scale
        requested = choices_of_real(expert_index, mask)
        priority = None
        if self.batch_prioritized:
            priority = tf.stop_gradient(tf.reduce_max(scores, axis=-1))  # [G, S]
        routing = assign(
            expert_index,
            weight,
            requested,
            requested,
            self.num_experts,
            capacity,
            priority,
            limit,
        )
        if training and self.trainable and self.bias_update_rate:
            self._move_bias(routing.load(mask))
        aux_loss = load_balancing_loss(gates, expert_index, mask, self.num_open_experts)
        return routing, gates, aux_loss * float(self.num_open_experts**2)

    def _move_bias(self, load: tf.Tensor) -> None:
        """Moves the bias by the load `[E]` of this and the accumulated batches."""
        every = self.bias_update_every or accumulated_batches() or 1
        every *= calls_per_batch()
        due = None
        if every > 1:
            self.load_so_far.update_state(load)
            load = tf.convert_to_tensor(self.load_so_far.load)
            due = tf.convert_to_tensor(self.load_so_far.batches) >= every
            self.load_so_far.reset_if(due)
        # The sum, so that all replicas' copies of the bias stay one.
        step = bias_direction(sum_over_replicas(load), self.masked_experts)
        step = step * self.bias_update_rate
        self.bias.assign_add(step if due is None else tf.where(due, step, 0.0))

    def get_config(self) -> dict[str, Any]:
        config = super().get_config()
        config.update(
            k=self.k,
            scores=self.scores,
            normalize_weights=self.normalize_weights,
            batch_prioritized=self.batch_prioritized,
            bias_update_rate=self.bias_update_rate,
            bias_update_every=self.bias_update_every,
            score_bias=self.score_bias,
            weight_scale=self.weight_scale,
            num_expert_groups=self.num_expert_groups,
            expert_groups_per_token=self.expert_groups_per_token,
            expert_group_score=self.expert_group_score,
        )
        return config
