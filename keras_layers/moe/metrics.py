"""Router metrics: dropped tokens, balance of load, losses."""

import math
from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf

from gshard_tf import annotate
from keras_layers.routing.router import RouterStats
from keras_layers.routing.routing import Routing
from keras_layers.step_metrics import StepMetric

#: Metrics that a layer reports by default: enough to see a router go wrong, short
#: enough for a progress bar.
DEFAULT_METRICS = ("dropped", "load_entropy", "max_load")


@keras.saving.register_keras_serializable(package="gshard_tf")
class RouterMetrics(StepMetric):
    """Dropped tokens and balance of load, over all batches since the last reset.

    Padding counts in none of them, masked experts neither: E is the number of experts
    that tokens may go to. Results, each named `<name>_...`:

    * `dropped`: share of tokens that no expert took (their output is 0), in [0, 1].
    * `utilisation`: share of the slots that may be filled which hold a token; the rest
      is computed in vain.
    * `load_entropy`: entropy of the experts' shares of the load over `log E`: 1 when
      even, 0 when one expert gets everything.
    * `max_load`: load of the busiest expert over the even share: 1 when even, E when
      it gets everything.
    * `confidence`: mean of the largest gate of each token: 1/E for uniform gates, 1 for
      one-hot gates.
    * `z_loss`, `aux_loss`: the router's losses, without their coefficients.
    * `load_<e>`: share of the load of expert e, with `per_expert`.

    Load is the router's demand, before capacity and random dropping: a full buffer
    would hide how uneven the demand is.

    Args:
        num_experts: E.
        per_expert: Whether to report the load of each expert, for small E.
        report: Names out of `NAMES`, or "all".
        masked_experts: Experts that no token may go to, by number.

    Raises:
        ValueError: for a name that is none of `NAMES`.
    """

    NAMES = (
        "dropped",
        "utilisation",
        "load_entropy",
        "max_load",
        "confidence",
        "z_loss",
        "aux_loss",
    )

    def __init__(
        self,
        num_experts: int,
        per_expert: bool = False,
        report: str | Sequence[str] = DEFAULT_METRICS,
        name: str = "router",
        dtype: Any = None,
        masked_experts: Sequence[int] = (),
    ):
        # Counts: not to be rounded by a mixed policy.
        super().__init__(name=name, dtype="float32")
        names = self.NAMES if report == "all" else tuple(report)
        unknown = [n for n in names if n not in self.NAMES]
        if unknown or isinstance(report, str) and report != "all":
            raise ValueError(
                f'Metrics of a router must be "all" or some of {list(self.NAMES)}. '
                f"Received: {report!r}"
            )
        self.num_experts = num_experts
        self.per_expert = per_expert
        self.report = names
        self.masked_experts = list(masked_experts)
        self._num_open = num_experts - len(set(self.masked_experts))
        self.load = self.add_variable((num_experts,), "zeros", name="load")
        self.tokens = self._sum("tokens")
        self.dropped = self._sum("dropped")
        # Each costs some scalars of communication, so only those in `report`.
        if "utilisation" in names:
            self.filled, self.slots = self._sum("filled"), self._sum("slots")
        self.sums = {
            n: self._sum(n) for n in ("confidence", "z_loss", "aux_loss") if n in names
        }

    def _sum(self, name: str) -> keras.Variable:
        return self.add_variable((), "zeros", name=name)

    def update_state(
        self,
        routing: Routing,
        mask: tf.Tensor | None = None,
        stats: RouterStats | None = None,
        sample_weight: Any = None,
    ) -> None:
        """Counts one batch.

        Args:
            routing: Of G groups of S tokens.
            mask: `[G, S]` bool, False for padding; or None.
            stats: The router's; None (of a replayed routing) counts as 0.
            sample_weight: Not supported.
        """
        if sample_weight is not None:
            raise ValueError(
                "RouterMetrics counts tokens: sample_weight must be None. "
                f"Received: sample_weight={sample_weight}"
            )
        arrived = routing.any_expert()  # [G, S]
        real = tf.ones_like(arrived) if mask is None else tf.cast(mask, tf.bool)
        tokens = tf.reduce_sum(tf.cast(real, tf.float32))
        self.load.assign_add(routing.load(mask))
        self.tokens.assign_add(tokens)
        lost = tf.logical_and(real, tf.logical_not(arrived))
        self.dropped.assign_add(tf.reduce_sum(tf.cast(lost, tf.float32)))
        if "utilisation" in self.report:
            self.filled.assign_add(routing.num_filled())
            share = self._num_open / self.num_experts
            self.slots.assign_add(routing.slots() * share)
        if stats is not None:
            for name, total in self.sums.items():
                total.assign_add(getattr(stats, name) * tokens)

    def result(self) -> dict[str, tf.Tensor]:
        self.count_deferred()
        # E numbers, needed whole on every device.
        load = annotate(tf.convert_to_tensor(self.load), (None,))
        share = tf.math.divide_no_nan(load, tf.reduce_sum(load))  # [E]
        values = {
            "dropped": self._ratio(self.dropped, self.tokens),
            "load_entropy": -tf.reduce_sum(tf.math.xlogy(share, share))
            / math.log(max(self._num_open, 2)),
            "max_load": tf.reduce_max(share) * self._num_open,
        }
        if "utilisation" in self.report:
            values["utilisation"] = self._ratio(self.filled, self.slots)
        for name, total in self.sums.items():
            values[name] = self._ratio(total, self.tokens)
        prefix = f"{self.qualifier}{self.name}"
        results = {f"{prefix}_{name}": values[name] for name in self.report}
        if self.per_expert:
            for e in range(self.num_experts):
                results[f"{prefix}_load_{e}"] = share[e]
        return results

    @staticmethod
    def _ratio(a: keras.Variable, b: keras.Variable) -> tf.Tensor:
        return tf.math.divide_no_nan(tf.convert_to_tensor(a), tf.convert_to_tensor(b))

    def get_config(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "num_experts": self.num_experts,
            "per_expert": self.per_expert,
            "report": list(self.report),
            "masked_experts": self.masked_experts,
        }
