"""Losses and metrics of tokens, from one pass over the logits."""

from keras_layers.losses.crossentropy import TokenCrossentropy
from keras_layers.losses.metrics import (
    NegativeLogLikelihood,
    Perplexity,
    TokenAccuracy,
)
from keras_layers.losses.projected import projected_statistics
from keras_layers.losses.statistics import TokenStatistics, token_statistics

__all__ = [
    "NegativeLogLikelihood",
    "Perplexity",
    "TokenAccuracy",
    "TokenCrossentropy",
    "TokenStatistics",
    "projected_statistics",
    "token_statistics",
]
