"""The translator: a `Transformer`, its optimizer and schedule, its loss."""

from __future__ import annotations

import contextlib
from typing import Any

import keras
import tensorflow as tf

import gshard_tf
from gshard_examples.translation.settings import Settings
from gshard_examples.translation.vocabulary import PAD, Vocabulary
from gshard_tf.optimizers import Adafactor
from keras_layers import (
    NegativeLogLikelihood,
    TokenAccuracy,
    TokenCrossentropy,
    Transformer,
)


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


def make_strategy(settings: Settings) -> gshard_tf.SpmdStrategy | None:
    """The strategy that settings ask for, or None for plain Keras."""
    if not settings.partitions:
        return None
    if settings.device == "CPU":
        gshard_tf.request_cpu_devices(settings.partitions)
    mesh = gshard_tf.create_mesh({"expert": settings.partitions}, settings.device)
    return gshard_tf.SpmdStrategy(mesh)


def scope(strategy: tf.distribute.Strategy | None) -> Any:
    """`strategy.scope()`, or nothing for plain Keras."""
    return strategy.scope() if strategy else contextlib.nullcontext()


def make_model(settings: Settings, vocabulary: Vocabulary) -> keras.Model:
    """The compiled model; call it inside the strategy's scope."""
    # Every device should have as many rows of the table as any other.
    vocab_size = -(-vocabulary.size // 64) * 64
    options = None
    if settings.experts:
        options = {
            "router": {"capacity_factor": settings.capacity_factor},
            "group_size": settings.group_size or None,
        }
    model = Transformer(
        vocab_size,
        vocab_size,
        settings.encoder_layers,
        settings.decoder_layers,
        model_dim=settings.model_dim,
        hidden_dim=settings.hidden_dim,
        num_heads=settings.heads,
        num_experts=settings.experts or None,
        moe_options=options,
        dropout=settings.dropout,
        share_embeddings=True,
        pad_id=PAD,
        seed=settings.seed,
        dtype=settings.precision,
        name="translator",
    )
    model.compile(
        optimizer=_optimizer(settings),
        loss=TokenCrossentropy(
            label_smoothing=settings.label_smoothing,
            z_loss=settings.z_loss,
            ignore_class=PAD,
        ),
        weighted_metrics=[
            # The loss may hold smoothing, a z-loss and the routers' balancing too;
            # this is the translation's.
            NegativeLogLikelihood(name="nll"),
            TokenAccuracy(name="token_accuracy"),
        ],
    )
    model.build([(None, None), (None, None)])
    return model


def _optimizer(settings: Settings) -> keras.optimizers.Optimizer:
    rate = InverseSquareRoot(
        settings.learning_rate, settings.warmup, settings.schedule == "linear"
    )
    if settings.optimizer == "adafactor":
        return Adafactor(rate, beta_2_decay=-0.8, clip_threshold=1.0)
    kind = {"adam": keras.optimizers.Adam, "adamw": keras.optimizers.AdamW}
    return kind[settings.optimizer](rate, beta_2=0.98, epsilon=1e-9)
