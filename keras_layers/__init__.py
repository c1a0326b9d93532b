"""Keras layers of GShard: mixture of experts, sharded attention, Transformer."""

from keras_layers.attention import MultiHeadAttention
from keras_layers.blocks import DecoderBlock, EncoderBlock
from keras_layers.convolution import (
    AveragePooling2D,
    Conv2D,
    Conv2DTranspose,
    DepthwiseConv2D,
    MaxPooling2D,
    SeparableConv2D,
)
from keras_layers.decoding import (
    Hypotheses,
    beam_search,
    greedy_decode,
    length_limits,
    sample_decode,
)
from keras_layers.dropout import Dropout
from keras_layers.embedding import TokenEmbedding, VocabularyProjection
from keras_layers.feed_forward import FeedForward
from keras_layers.losses import (
    NegativeLogLikelihood,
    Perplexity,
    TokenAccuracy,
    TokenCrossentropy,
    TokenStatistics,
    projected_statistics,
    token_statistics,
)
from keras_layers.moe import (
    EinsumDispatcher,
    ExpertLoadImages,
    Experts,
    IndexDispatcher,
    MoELayer,
    RouterMetrics,
    assign_transformers_weights,
)
from keras_layers.routing import (
    ExpertChoiceRouter,
    ExpertChoiceRouting,
    HashRouter,
    Router,
    RouterStats,
    Routing,
    TokenChoiceRouting,
    Top2Router,
    TopKRouter,
    expert_capacity,
    record_routing,
    replay_routing,
)
from keras_layers.stacked_weights import stack_weights, unstack_weights
from keras_layers.transformer import Transformer
from keras_layers.upcycling import upcycle

__all__ = [
    "AveragePooling2D",
    "Conv2D",
    "Conv2DTranspose",
    "DecoderBlock",
    "DepthwiseConv2D",
    "Dropout",
    "EinsumDispatcher",
    "EncoderBlock",
    "ExpertChoiceRouter",
    "ExpertChoiceRouting",
    "Experts",
    "FeedForward",
    "HashRouter",
    "Hypotheses",
    "IndexDispatcher",
    "ExpertLoadImages",
    "MaxPooling2D",
    "MoELayer",
    "MultiHeadAttention",
    "NegativeLogLikelihood",
    "Perplexity",
    "Router",
    "RouterMetrics",
    "RouterStats",
    "Routing",
    "SeparableConv2D",
    "TokenAccuracy",
    "TokenChoiceRouting",
    "TokenCrossentropy",
    "TokenEmbedding",
    "TokenStatistics",
    "Top2Router",
    "TopKRouter",
    "Transformer",
    "VocabularyProjection",
    "assign_transformers_weights",
    "beam_search",
    "expert_capacity",
    "greedy_decode",
    "length_limits",
    "projected_statistics",
    "record_routing",
    "replay_routing",
    "sample_decode",
    "stack_weights",
    "token_statistics",
    "unstack_weights",
    "upcycle",
]
