"""Keras layers of GShard: mixture of experts, sharded attention, Transformer."""

from keras_layers.attention import MultiHeadAttention
from keras_layers.decoding import greedy_decode
from keras_layers.dispatch import EinsumDispatcher, IndexDispatcher
from keras_layers.dropout import Dropout
from keras_layers.embedding import TokenEmbedding, VocabularyProjection
from keras_layers.feed_forward import FeedForward
from keras_layers.moe import Experts, MoELayer
from keras_layers.router_metrics import RouterHealth
from keras_layers.routing import Routing, Top2Router, expert_capacity
from keras_layers.transformer import DecoderBlock, EncoderBlock, Transformer

__all__ = [
    "DecoderBlock",
    "Dropout",
    "EinsumDispatcher",
    "EncoderBlock",
    "Experts",
    "FeedForward",
    "IndexDispatcher",
    "MoELayer",
    "MultiHeadAttention",
    "RouterHealth",
    "Routing",
    "TokenEmbedding",
    "Top2Router",
    "Transformer",
    "VocabularyProjection",
    "expert_capacity",
    "greedy_decode",
]
