"""Decoding as a partitioned program: the results of one device, and what it moves."""

import collections

import numpy as np
import pytest
import tensorflow as tf
from decoding_models import BOS, EOS, small, sources

import gshard_tf
from keras_layers import beam_search, greedy_decode, sample_decode

# Over a minute: programs of 8 and 4x2 partitions are compiled.
pytestmark = pytest.mark.slow

IDS = sources(8, seed=3)
BATCH = 8


def decode(model, flat):
    """Every way to decode at once, so that there is one program to compile."""

    def run(ids):
        greedy, log_prob = greedy_decode(model, ids, 6, BOS, EOS)
        sampled, _ = sample_decode(model, ids, 6, BOS, EOS, [1, 2], top_p=0.9)
        found = beam_search(
            model, ids, 6, BOS, EOS, 3, num_results=2, early_stop=False, flat=flat
        )
        return greedy, log_prob, sampled, *found

    return tf.function(run)


def on_mesh(axes):
    strategy = gshard_tf.SpmdStrategy(gshard_tf.create_mesh(axes))
    with strategy.scope():
        return strategy, small(num_experts=8)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """What one device decodes, and the same model as a checkpoint in eight pieces."""
    model = small(num_experts=8)
    _, sharded = on_mesh({"expert": 8})
    sharded.set_weights(model.get_weights())
    checkpoints = gshard_tf.CheckpointManager(
        tmp_path_factory.mktemp("checkpoints"), asynchronous=False
    )
    checkpoints.save(gshard_tf.training_state(sharded), step=1)
    return checkpoints, [x.numpy() for x in decode(model, False)(IDS)]


@pytest.mark.parametrize(
    ("axes", "flat"),
    [({"expert": 1}, False), ({"expert": 8}, True), ({"data": 4, "model": 2}, False)],
)
def test_any_number_of_partitions_decodes_alike(plain, axes, flat):
    checkpoints, expected = plain
    strategy, model = on_mesh(axes)
    checkpoints.restore(gshard_tf.training_state(model))
    found = strategy.run(decode(model, flat), (tf.constant(IDS),))
    for ours, theirs in zip(found, expected, strict=True):
        if theirs.dtype.kind == "i":
            np.testing.assert_array_equal(ours, theirs)
        else:
            np.testing.assert_allclose(ours, theirs, atol=1e-4)
    (program,) = strategy.programs
    moved = program.collectives()
    kinds = collections.Counter(found.kind for found in moved)
    if axes == {"expert": 8}:
        # One way and back, per layer with experts: two in the decoder and one in the
        # encoder, in each of the three ways to decode.
        assert kinds["all-to-all"] == 3 * 2 * 3
        # Besides that a few numbers per row: is everybody done, which to take.
        assert set(kinds) <= {"all-to-all", "all-reduce", "all-gather"}
        other = [c.bytes for c in moved if c.kind != "all-to-all"]
        assert max(other) <= 4 * 8 * 2 * 6 and len(other) <= 20
