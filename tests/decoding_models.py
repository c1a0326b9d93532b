"""Small models to decode with: a Transformer, and logits that are known."""

import numpy as np
import tensorflow as tf

from keras_layers import Transformer

BOS, EOS = 1, 2


def untrained(**arguments):
    """A Transformer of 11 target tokens; every block has 4 experts."""
    defaults = {
        "source_vocab_size": 12,
        "target_vocab_size": 11,
        "num_encoder_layers": 1,
        "num_decoder_layers": 1,
        "model_dim": 8,
        "hidden_dim": 16,
        "num_heads": 2,
        "num_experts": 4,
        "moe_every": 1,
        "dropout": 0.0,
        "seed": 0,
    }
    return Transformer(**{**defaults, **arguments})


def small(**arguments):
    """The same with outputs that vary, and some of which end."""
    defaults = {"num_decoder_layers": 2, "tie_output": False}
    model = untrained(**{**defaults, **arguments})
    model.build([(None, None), (None, None)])
    # Sharp enough to differ from row to row, and to end now and then.
    kernel = model.projection.kernel
    kernel.assign(kernel * 3.0)
    return model


def sources(batch=6, length=6, seed=0):
    """Ids above the special ones, with padding at the end of some rows."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(3, 11, (batch, length))
    lengths = rng.integers(2, length + 1, (batch, 1))
    return np.where(np.arange(length) < lengths, ids, 0).astype("int32")


class Fixed:
    """The same logits whatever came before: `[V]`, or a row of them per source."""

    pad_id = 0

    def __init__(self, logits):
        self.logits = tf.constant(logits, tf.float32)

    def start_decoding(self, source_ids, max_length, hypotheses=1, flat=False):
        return {"steps": tf.zeros([len(source_ids)], tf.int32)}

    def decode_step(self, tokens, state, index):
        logits = self.logits
        if logits.shape.rank == 2 and tokens.shape.rank == 2:
            logits = logits[:, None]
        shape = [*tokens.shape, logits.shape[-1]]
        return tf.broadcast_to(logits, shape), {"steps": state["steps"] + 1}

    def reorder_decoding(self, state, parents):
        return state
