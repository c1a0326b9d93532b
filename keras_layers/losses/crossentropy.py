"""Cross-entropy of tokens, with label smoothing and the softmax's z-loss."""

from typing import Any

import keras
import tensorflow as tf

from gshard_tf.compat.keras_masks import set_keras_mask
from keras_layers._arguments import check_coefficient, check_rate
from keras_layers.losses.projected import unpack
from keras_layers.losses.statistics import integer_labels, token_statistics


@keras.saving.register_keras_serializable(package="gshard_tf")
class TokenCrossentropy(keras.losses.Loss):
    """Cross-entropy of logits `[..., V]` and integer labels `[...]`, in nats.

    Without smoothing and z-loss it is Keras's `SparseCategoricalCrossentropy` with
    `from_logits=True`, and weights, masks and the reduction work as there. Beside the
    metrics of this package (`NegativeLogLikelihood`, `TokenAccuracy`) a compiled step
    computes the sum of exponentials and the maximum of the logits once for all.

    Args:
        label_smoothing: The share of the target that is spread evenly over all V
            classes, in [0, 1) (the Transformer of Vaswani et al.: 0.1).
        z_loss: Coefficient of `log(Z)**2`, Z the sum of exponentials; it keeps logits
            from drifting (PaLM, section 5: 1e-4).
        ignore_class: A label that is left out: its positions have a loss of 0 and do
            not count in the mean. None: none.
        from_statistics: Whether predictions are packed statistics `[..., 4]`, which a
            model returns whose logits never exist whole (see
            `VocabularyProjection`), and not logits.
        reduction: Keras's.
        name: Its name in logs.

    Raises:
        ValueError: for an argument out of its range.
    """

    def __init__(
        self,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        ignore_class: int | None = None,
        reduction: str | None = "sum_over_batch_size",
        name: str = "token_crossentropy",
        from_statistics: bool = False,
    ):
        # Whatever Keras's default dtype: logarithms of sums need it.
        super().__init__(name=name, reduction=reduction, dtype="float32")
        self.label_smoothing = check_rate("label_smoothing", label_smoothing)
        self.z_loss = check_coefficient("z_loss", z_loss)
        self.ignore_class = ignore_class
        self.from_statistics = bool(from_statistics)

    def call(self, y_true: Any, y_pred: Any) -> tf.Tensor:
        """Losses `[...]` of labels `[...]` and logits `[..., V]`."""
        if self.from_statistics:
            statistics = unpack(y_pred)
        else:
            statistics = token_statistics(y_true, y_pred)
        target = statistics.label_logit
        if self.label_smoothing:
            target += self.label_smoothing * (statistics.mean_logit - target)
        losses = statistics.log_sum_exp - target
        if self.z_loss:
            losses += self.z_loss * tf.square(statistics.log_sum_exp)
        if self.ignore_class is None:
            return losses
        valid = integer_labels(y_true, len(y_pred.shape)) != self.ignore_class
        losses = tf.where(valid, losses, 0.0)
        set_keras_mask(losses, valid)
        return losses

    def get_config(self) -> dict[str, Any]:
        config = super().get_config()
        config.update(
            label_smoothing=self.label_smoothing,
            z_loss=self.z_loss,
            ignore_class=self.ignore_class,
            from_statistics=self.from_statistics,
        )
        return config
