"""Small models to decode with: a Transformer, and logits that are known."""

import numpy as np
import tensorflow as tf

from keras_layers import Transformer
from keras_layers.embedding import sinusoids

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
    model = untrained(num_decoder_layers=2, tie_output=False, **arguments)
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


class Uncached:
    """A Transformer without its caches: all of the prefix again for each token."""

    def __init__(self, model):
        self.model = model
        self.pad_id = model.pad_id

    def start_decoding(self, source_ids, max_length, hypotheses=1, flat=False):
        memory, mask = self.model.encode(source_ids, decoding=True)
        shape = [len(source_ids), hypotheses, max_length]
        return {
            "memory": tf.repeat(memory, hypotheses, axis=0),
            "mask": tf.repeat(mask, hypotheses, axis=0),
            "prefix": tf.zeros(shape, tf.int32),
        }

    def decode_step(self, tokens, state, index):
        model, prefix = self.model, state["prefix"]
        _, hypotheses, length = prefix.shape
        shape = [-1, hypotheses] if len(tokens.shape) == 2 else [-1]
        tokens = tf.reshape(tokens, [-1, hypotheses, 1])
        prefix = tf.where(tf.range(length) == index, tokens, prefix)
        so_far = tf.reshape(prefix, [-1, length])[:, : index + 1]
        positions = sinusoids(tf.range(index + 1), model.model_dim)
        x = model.target_embedding(so_far) + positions[None]
        for block in model.decoder_blocks:
            x = block(x, state["memory"], memory_mask=state["mask"], decoding=True)
        logits = model._logits(x[:, -1:])
        logits = tf.reshape(logits, [*shape, logits.shape[-1]])
        return logits, {**state, "prefix": prefix}

    def reorder_decoding(self, state, parents):
        prefix = tf.gather(state["prefix"], parents, batch_dims=1)
        return {**state, "prefix": prefix}
