"""Top-k routing: Switch (k = 1), Mixtral, Qwen, DeepSeek and their like."""

from typing import Any

import keras
import tensorflow as tf

from keras_layers.checks import check_choice, check_coefficient, check_int
from keras_layers.routing.assignment import (
    assign,
    read_out,
    top_choices,
)
from keras_layers.routing.counting import choices_of_real
from keras_layers.routing.losses import load_balancing_loss
from keras_layers.routing.plans import Routing
from keras_layers.routing.router import Router


@keras.saving.register_keras_serializable(package="gshard_tf")
class TopKRouter(Router):
    """Each token goes to the k experts with the largest scores.

    `k=1, normalize_weights=False` is the Switch Transformer's router (arXiv
    2101.03961), `k=2` Mixtral's and `k=8, scores="sigmoid", bias_update_rate=1e-3`
    in the manner of DeepSeek-V3 (arXiv 2412.19437), each with a capacity.

    Args:
        num_experts: E, at least 2.
        k: K, experts per token. More cost in proportion.
        capacity_factor: C = ceil(S * factor / E). None: K, room for every choice at
            perfect balance.
        scores: "softmax" over experts, or "sigmoid" of each logit.
        normalize_weights: Whether the weights of a token's K experts are scaled to sum
            to 1, before capacity is looked at. None: if K > 1. With K = 1 keep the
            gate itself, or the router would have no gradient.
        batch_prioritized: Whether tokens with larger scores get their slots first
            (V-MoE, arXiv 2106.05974), so that a small capacity drops the least
            important ones. The order then depends on later tokens of the group: not
            for a causal decoder.
        bias_update_rate: Balancing without a loss (DeepSeek-V3): each training step
            adds this to the bias of experts with less than their share of the batch
            and takes it from the others. The bias counts in choosing, not in the
            weights. 0: no bias; 0.001 is the paper's. Set MoELayer's `aux_loss_coef`
            to 0 or to something small with it.
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
        **kwargs: Any,
    ):
        check_int("k", k, 1)
        check_choice("scores", scores, ("softmax", "sigmoid"))
        check_coefficient("bias_update_rate", bias_update_rate)
        if capacity_factor is None:
            capacity_factor = float(k)
        super().__init__(num_experts, capacity_factor, **kwargs)
        self._check_enough_experts(k)
        self.k = k
        self.scores = scores
        self.normalize_weights = (
            k > 1 if normalize_weights is None else bool(normalize_weights)
        )
        self.batch_prioritized = bool(batch_prioritized)
        self.looks_ahead = self.batch_prioritized
        self.bias_update_rate = bias_update_rate
        self.bias = None

    def build(self, input_shape: Any) -> None:
        super().build(input_shape)
        if self.bias_update_rate:
            self.bias = self.add_weight(
                name="bias",
                shape=(self.num_experts,),
                initializer="zeros",
                trainable=False,
            )

    def route(
        self,
        logits: tf.Tensor,
        capacity: int | tf.Tensor,
        mask: tf.Tensor | None,
        training: bool | None,
        limit: tf.Tensor | None = None,
    ) -> tuple[Routing, tf.Tensor, tf.Tensor]:
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
        expert_index = top_choices(ranked, self.k)  # [G, S, K]
        weight = read_out(scores, expert_index)  # [G, S, K]
        if self.normalize_weights:
            total = tf.reduce_sum(weight, axis=-1, keepdims=True)
            weight = tf.math.divide_no_nan(weight, total)
        wanted = choices_of_real(expert_index, mask)
        priority = None
        if self.batch_prioritized:
            priority = tf.stop_gradient(tf.reduce_max(scores, axis=-1))  # [G, S]
        routing = assign(
            expert_index,
            weight,
            wanted,
            wanted,
            self.num_experts,
            capacity,
            priority,
            limit,
        )
        if training and self.bias is not None:
            load = routing.load(mask)  # [E], of the global batch
            self.bias.assign_add(
                self.bias_update_rate * tf.sign(tf.reduce_mean(load) - load)
            )
        aux_loss = load_balancing_loss(gates, expert_index, mask, self.num_open_experts)
        return routing, gates, aux_loss * float(self.num_open_experts**2)

    def get_config(self) -> dict[str, Any]:
        config = super().get_config()
        config.update(
            k=self.k,
            scores=self.scores,
            normalize_weights=self.normalize_weights,
            batch_prioritized=self.batch_prioritized,
            bias_update_rate=self.bias_update_rate,
        )
        return config
