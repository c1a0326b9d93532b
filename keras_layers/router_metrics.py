"""How well a router does its work, as a Keras metric."""

import math
from typing import Any

import keras
import tensorflow as tf

from gshard_tf import annotate
from keras_layers.routing import Routing


@keras.saving.register_keras_serializable(package="gshard_tf")
class RouterHealth(keras.metrics.Metric):
    """Dropped tokens and balance of load, over all batches since the last reset.

    Padding counts in none of them. Results, each named `<name>_...`:

    * `dropped`: share of tokens that no expert took (their output is 0), in [0, 1].
    * `load_entropy`: entropy of the experts' shares of the load over `log E`: 1 when
      even, 0 when one expert gets everything.
    * `max_load`: load of the busiest expert over the even share: 1 when even, E when
      it gets everything.
    * `load_<e>`: share of the load of expert e, with `per_expert`.

    Load is what the router asked for, before capacity and random dropping: a full
    buffer would hide how uneven the demand is.

    Args:
        num_experts: E.
        per_expert: Whether to report the load of each expert, for small E.
    """

    def __init__(
        self,
        num_experts: int,
        per_expert: bool = False,
        name: str = "router",
        dtype: Any = None,
    ):
        # Counts: not to be rounded by a mixed policy.
        super().__init__(name=name, dtype="float32")
        self.num_experts = num_experts
        self.per_expert = per_expert
        self.load = self.add_variable((num_experts,), "zeros", name="load")
        self.tokens = self.add_variable((), "zeros", name="tokens")
        self.dropped = self.add_variable((), "zeros", name="dropped")

    def update_state(
        self,
        routing: Routing,
        mask: tf.Tensor | None = None,
        sample_weight: Any = None,
    ) -> None:
        """Counts one batch.

        Args:
            routing: Of G groups of S tokens.
            mask: `[G, S]` bool, False for padding; or None.
            sample_weight: Not supported.
        """
        if sample_weight is not None:
            raise ValueError(
                "RouterHealth counts tokens, which have no weights. "
                f"Received: sample_weight={sample_weight}"
            )
        taken = tf.reduce_any(routing.kept, axis=-1)  # [G, S]
        real = tf.ones_like(taken) if mask is None else tf.cast(mask, tf.bool)
        chosen = tf.one_hot(routing.expert_index, self.num_experts)  # [G, S, K, E]
        chosen = chosen * tf.cast(real, tf.float32)[..., None, None]
        # Counted where the groups are, then added up. Left to itself, the partitioner
        # may split the count over experts and gather all groups' choices for it.
        chosen = annotate(chosen, ("group", None, None, None))
        load = annotate(tf.reduce_sum(chosen, axis=[0, 1, 2]), (None,))  # [E]
        self.load.assign_add(load)
        self.tokens.assign_add(tf.reduce_sum(tf.cast(real, tf.float32)))
        lost = tf.logical_and(real, tf.logical_not(taken))
        self.dropped.assign_add(tf.reduce_sum(tf.cast(lost, tf.float32)))

    def result(self) -> dict[str, tf.Tensor]:
        # E numbers, wanted whole on every device.
        load = annotate(tf.convert_to_tensor(self.load), (None,))
        share = tf.math.divide_no_nan(load, tf.reduce_sum(load))  # [E]
        entropy = -tf.reduce_sum(tf.math.xlogy(share, share))
        results = {
            f"{self.name}_dropped": tf.math.divide_no_nan(
                tf.convert_to_tensor(self.dropped), tf.convert_to_tensor(self.tokens)
            ),
            f"{self.name}_load_entropy": entropy / math.log(self.num_experts),
            f"{self.name}_max_load": tf.reduce_max(share) * self.num_experts,
        }
        if self.per_expert:
            for e in range(self.num_experts):
                results[f"{self.name}_load_{e}"] = share[e]
        return results

    def get_config(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "num_experts": self.num_experts,
            "per_expert": self.per_expert,
        }
