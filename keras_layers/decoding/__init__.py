"""Generation of target sequences with a cached decoder."""

from keras_layers.decoding.beam_search import Hypotheses, beam_search, length_penalty
from keras_layers.decoding.greedy import greedy_decode
from keras_layers.decoding.limits import length_limits
from keras_layers.decoding.sampling import sample_decode

__all__ = [
    "Hypotheses",
    "beam_search",
    "greedy_decode",
    "length_limits",
    "length_penalty",
    "sample_decode",
]
