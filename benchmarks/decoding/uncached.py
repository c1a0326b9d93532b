"""Decoding without caches, to compare with: the same loops, another model."""

import tensorflow as tf

from keras_layers.embedding import sinusoids


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
