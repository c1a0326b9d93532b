"""The translator: a `Transformer`, its loss and metrics, its mesh."""

from __future__ import annotations

import contextlib
import math
from typing import Any

import keras
import tensorflow as tf

import gshard_tf
from gshard_examples.translation.optimization import make_optimizer
from gshard_examples.translation.settings import Settings
from gshard_examples.translation.vocabulary import PAD, Vocabulary
from keras_layers import (
    NegativeLogLikelihood,
    TokenAccuracy,
    TokenCrossentropy,
    Transformer,
)

_REMAT: dict[str, bool | str] = {"none": False, "attention": "attention", "all": True}


def make_strategy(settings: Settings) -> gshard_tf.SpmdStrategy | None:
    """The strategy that settings ask for, or None for plain Keras."""
    axes = settings.mesh_axes
    if not axes:
        return None
    if settings.device == "CPU":
        gshard_tf.request_cpu_devices(math.prod(axes.values()))
    mesh = gshard_tf.create_mesh(axes, settings.device)
    return gshard_tf.SpmdStrategy(mesh, mesh_rules(settings))


def mesh_rules(settings: Settings) -> gshard_tf.AxisRules:
    """Rules of what is split over the mesh's axes `data`, `expert` and `model`.

    Experts are split over `expert`, or else over `data`; tokens over `data`, or else
    over `expert`, as in the paper; the widths of layers and the vocabulary over
    `model`. What has no axis is not split.
    """

    def first(*names: str) -> str | None:
        return next((name for name in names if name in settings.mesh_axes), None)

    tokens, experts = first("data", "expert"), first("expert", "data")
    rules = {"batch": tokens}
    if settings.experts:
        rules |= {"group": tokens, "expert": experts}
    rules |= dict.fromkeys(("mlp", "heads", "vocab"), first("model"))
    return gshard_tf.AxisRules(rules)


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
            "aux_loss_coef": settings.aux_loss_coef,
            "dropout": settings.expert_dropout,
        }
    model = Transformer(
        vocab_size,
        vocab_size,
        settings.encoder_layers,
        settings.decoder_layers,
        model_dim=settings.model_dim,
        hidden_dim=settings.hidden_dim,
        num_heads=settings.heads,
        key_dim=settings.key_dim or None,
        num_experts=settings.experts or None,
        moe_options=options,
        dropout=settings.dropout,
        share_embeddings=True,
        pad_id=PAD,
        seed=settings.seed,
        remat=_REMAT[settings.remat],
        stacked=settings.stacked,
        dtype=settings.precision,
        name="translator",
    )
    model.compile(
        optimizer=make_optimizer(settings),
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
