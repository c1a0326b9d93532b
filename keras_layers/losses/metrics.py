"""Metrics of tokens that share their passes over the logits with the loss."""

from typing import Any

import keras
import tensorflow as tf

from gshard_tf.compat.keras_masks import keras_mask
from gshard_tf.compat.keras_metrics import set_direction
from keras_layers.losses.projected import unpack
from keras_layers.losses.statistics import (
    TokenStatistics,
    integer_labels,
    token_statistics,
)


class _TokenMean(keras.metrics.Mean):
    """Mean of a value of each token, of logits `[..., V]` and labels `[...]`.

    Args:
        name: Its name in logs.
        dtype: Of the sums; Keras's.
        ignore_class: A label that is left out. None: none.
        from_statistics: Whether predictions are packed statistics `[..., 4]`, as for
            `TokenCrossentropy`.
    """

    def __init__(
        self,
        name: str,
        dtype: Any = None,
        ignore_class: int | None = None,
        from_statistics: bool = False,
    ):
        super().__init__(name=name, dtype=dtype)
        self.ignore_class = ignore_class
        self.from_statistics = bool(from_statistics)

    def values(self, statistics: TokenStatistics) -> tf.Tensor:
        """Returns the value of each token, `[...]`."""
        raise NotImplementedError

    def update_state(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> None:
        """Adds the tokens of a batch.

        As in Keras's metrics, each of a batch's L positions weighs 1 / L: among
        batches of several lengths, a token of a shorter one weighs more.

        Args:
            y_true: Labels `[...]` or `[..., 1]`.
            y_pred: Logits `[..., V]`. Positions that their Keras mask leaves out have
                a weight of 0.
            sample_weight: Weights of tokens, or of the first dimensions of labels.
        """
        if self.from_statistics:
            values = self.values(unpack(tf.convert_to_tensor(y_pred)))
        else:
            values = self.values(token_statistics(y_true, y_pred, reuse=True))
        mask = keras_mask(y_pred)
        if self.ignore_class is not None:
            valid = integer_labels(y_true, len(y_pred.shape)) != self.ignore_class
            values = tf.where(valid, values, 0.0)
            mask = valid if mask is None else mask & valid
        if mask is not None:
            sample_weight = _masked_weights(sample_weight, mask)
        return super().update_state(values, sample_weight)

    def get_config(self) -> dict[str, Any]:
        config = super().get_config()
        config.update(
            ignore_class=self.ignore_class, from_statistics=self.from_statistics
        )
        return config


def _masked_weights(weights: Any, mask: tf.Tensor) -> tf.Tensor:
    """Returns weights of the shape of `mask`, 0 where it is False."""
    mask = tf.cast(mask, tf.float32)
    if weights is None:
        return mask
    weights = tf.cast(weights, tf.float32)
    for _ in range(mask.shape.rank - weights.shape.rank):
        weights = weights[..., None]
    return weights * mask


@keras.saving.register_keras_serializable(package="gshard_tf")
class NegativeLogLikelihood(_TokenMean):
    """Mean negative log-likelihood, in nats per token.

    Not the loss where that has smoothing, a z-loss, or the losses of layers: it stays
    comparable between runs that differ in those.

    Args:
        name: Its name in logs.
        dtype: Of the sums; Keras's.
        ignore_class: A label that is left out. None: none.
        from_statistics: Whether predictions are packed statistics `[..., 4]`, as for
            `TokenCrossentropy`.
    """

    def __init__(
        self,
        name: str = "nll",
        dtype: Any = None,
        ignore_class: int | None = None,
        from_statistics: bool = False,
    ):
        super().__init__(name, dtype, ignore_class, from_statistics)
        set_direction(self, "down")

    def values(self, statistics: TokenStatistics) -> tf.Tensor:
        return statistics.log_sum_exp - statistics.label_logit


@keras.saving.register_keras_serializable(package="gshard_tf")
class Perplexity(NegativeLogLikelihood):
    """The exponential of the mean negative log-likelihood of a token.

    Args:
        name: Its name in logs.
        dtype: Of the sums; Keras's.
        ignore_class: A label that is left out. None: none.
        from_statistics: Whether predictions are packed statistics `[..., 4]`, as for
            `TokenCrossentropy`.
    """

    def __init__(
        self,
        name: str = "perplexity",
        dtype: Any = None,
        ignore_class: int | None = None,
        from_statistics: bool = False,
    ):
        super().__init__(name, dtype, ignore_class, from_statistics)

    def result(self) -> tf.Tensor:
        return tf.exp(super().result())


@keras.saving.register_keras_serializable(package="gshard_tf")
class TokenAccuracy(_TokenMean):
    """The share of tokens whose label has the largest logit.

    Among equal logits the first counts as the largest, as in Keras's
    `SparseCategoricalAccuracy`.

    Args:
        name: Its name in logs.
        dtype: Of the sums; Keras's.
        ignore_class: A label that is left out. None: none.
        from_statistics: Whether predictions are packed statistics `[..., 4]`, as for
            `TokenCrossentropy`.
    """

    def __init__(
        self,
        name: str = "token_accuracy",
        dtype: Any = None,
        ignore_class: int | None = None,
        from_statistics: bool = False,
    ):
        super().__init__(name, dtype, ignore_class, from_statistics)
        set_direction(self, "up")

    def values(self, statistics: TokenStatistics) -> tf.Tensor:
        return statistics.correct
