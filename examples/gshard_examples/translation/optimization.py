"""The optimizer of a run, and its learning-rate schedule."""

from __future__ import annotations

import math
from typing import Any

import keras
import tensorflow as tf

from gshard_examples.translation.settings import Settings
from gshard_tf.optimizers import Adafactor


@keras.saving.register_keras_serializable(package="gshard_tf_examples")
class InverseSquareRoot(keras.optimizers.schedules.LearningRateSchedule):
    """`peak` until step `warmup`, then `peak * sqrt(warmup / step)` (paper, section 4).

    Args:
        peak: The highest rate. The paper's: 1 / sqrt(10,000) = 0.01.
        warmup: Steps before it decays. The paper's: 10,000.
        linear: Whether to rise linearly to the peak, as is usual with Adam, rather
            than to start at it.
    """

    def __init__(self, peak: float, warmup: int, linear: bool = True):
        super().__init__()
        self.peak, self.warmup, self.linear = peak, warmup, linear

    def __call__(self, step: Any) -> tf.Tensor:
        step = tf.cast(step, tf.float32) + 1.0
        warmup = float(self.warmup)
        rise = tf.minimum(step / warmup, 1.0) if self.linear else 1.0
        return self.peak * rise * tf.sqrt(warmup / tf.maximum(step, warmup))

    def get_config(self) -> dict[str, Any]:
        return {"peak": self.peak, "warmup": self.warmup, "linear": self.linear}


@keras.saving.register_keras_serializable(package="gshard_tf_examples")
class DecayToZero(keras.optimizers.schedules.LearningRateSchedule):
    """A linear rise to `peak` at step `warmup`, then a way down to 0 after `steps`.

    The last step has a rate a little above 0; there is none at 0.

    Args:
        peak: The highest rate.
        warmup: Steps before it decays.
        steps: Steps of the whole run, more than `warmup`.
        cosine: Whether to fall as half a cosine, slowly at first and at last, rather
            than linearly.
    """

    def __init__(self, peak: float, warmup: int, steps: int, cosine: bool = True):
        super().__init__()
        self.peak, self.warmup, self.steps = peak, warmup, steps
        self.cosine = cosine

    def __call__(self, step: Any) -> tf.Tensor:
        step = tf.cast(step, tf.float32) + 1.0
        warmup = float(self.warmup)
        # Share of the way down that is done before this step.
        done = (step - warmup) / (self.steps + 1.0 - warmup)
        done = tf.clip_by_value(done, 0.0, 1.0)
        fall = 0.5 + 0.5 * tf.cos(math.pi * done) if self.cosine else 1.0 - done
        return self.peak * tf.minimum(step / warmup, 1.0) * fall

    def get_config(self) -> dict[str, Any]:
        return {
            "peak": self.peak,
            "warmup": self.warmup,
            "steps": self.steps,
            "cosine": self.cosine,
        }


def make_schedule(
    settings: Settings,
) -> keras.optimizers.schedules.LearningRateSchedule:
    """The learning rate by step, as settings ask for it."""
    peak, warmup = settings.learning_rate, settings.warmup
    if settings.decays_to_zero:
        warmup = min(warmup, max(1, settings.steps // 2))
        return DecayToZero(peak, warmup, settings.steps, settings.schedule == "cosine")
    return InverseSquareRoot(peak, warmup, settings.schedule == "linear")


def make_optimizer(settings: Settings) -> keras.optimizers.Optimizer:
    """The optimizer that settings ask for."""
    rate = make_schedule(settings)
    clip = settings.clip_norm or None
    if settings.optimizer == "adafactor":
        return Adafactor(
            rate, beta_2_decay=-0.8, clip_threshold=1.0, global_clipnorm=clip
        )
    options = {"beta_2": settings.beta_2, "epsilon": 1e-9, "global_clipnorm": clip}
    if settings.optimizer == "adamw":
        return keras.optimizers.AdamW(
            rate, weight_decay=settings.weight_decay, **options
        )
    return keras.optimizers.Adam(rate, **options)
