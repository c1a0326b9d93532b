"""Keras layers of GShard: mixture of experts, sharded attention, Transformer."""

from keras_layers.attention import MultiHeadAttention
from keras_layers.blocks import DecoderBlock, EncoderBlock
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
from keras_layers.moe.dispatch import EinsumDispatcher, IndexDispatcher
from keras_layers.moe.expert_load import LoadPicture
from keras_layers.moe.layer import Experts, MoELayer
from keras_layers.moe.metrics import RouterHealth
from keras_layers.routing import (
    ExpertChoiceRouter,
    HashRouter,
    Router,
    RouterReport,
    Routing,
    SlotRouting,
    Top2Router,
    TopKRouter,
    expert_capacity,
    record_routing,
    replay_routing,
)
from keras_layers.stacked import stack_weights, unstack_weights
from keras_layers.transformer import Transformer
from keras_layers.upcycling import upcycle

__all__ = [
    "DecoderBlock",
    "Dropout",
    "EinsumDispatcher",
    "EncoderBlock",
    "ExpertChoiceRouter",
    "Experts",
    "FeedForward",
    "HashRouter",
    "Hypotheses",
    "IndexDispatcher",
    "LoadPicture",
    "MoELayer",
    "MultiHeadAttention",
    "Router",
    "RouterHealth",
    "RouterReport",
    "Routing",
    "SlotRouting",
    "TokenEmbedding",
    "Top2Router",
    "TopKRouter",
    "Transformer",
    "VocabularyProjection",
    "beam_search",
    "expert_capacity",
    "greedy_decode",
    "length_limits",
    "record_routing",
    "replay_routing",
    "sample_decode",
    "stack_weights",
    "unstack_weights",
    "upcycle",
]
