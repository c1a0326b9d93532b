"""Mixture of experts: the layer, its experts, dispatchers, metrics and options."""

from keras_layers.moe.dispatch import Dispatcher, EinsumDispatcher, IndexDispatcher
from keras_layers.moe.expert_load import ExpertLoadImages
from keras_layers.moe.experts import Experts
from keras_layers.moe.layer import MoELayer
from keras_layers.moe.metrics import RouterMetrics
from keras_layers.moe.transformers_weights import assign_transformers_weights

__all__ = [
    "Dispatcher",
    "EinsumDispatcher",
    "Experts",
    "IndexDispatcher",
    "ExpertLoadImages",
    "MoELayer",
    "RouterMetrics",
    "assign_transformers_weights",
]
