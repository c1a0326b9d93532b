"""Sampling: the right distribution, cut at the right place, repeatable."""

import numpy as np
import pytest
import tensorflow as tf
from decoding_models import BOS, EOS, Fixed, small, sources

from keras_layers import greedy_decode, sample_decode

LOGITS = np.array([3.0, -2.0, 0.5, 1.0, 2.0, 0.0, 1.5], np.float32)
ROWS = 20_000


def draws(**options):
    """One token for each of many rows."""
    ids = tf.ones([ROWS, 1], tf.int32)
    found, log_prob = sample_decode(
        Fixed(LOGITS), ids, 1, BOS, EOS, seed=[3, 5], **options
    )
    return found[:, 0].numpy(), log_prob.numpy()


def distribution(temperature=1.0, top_k=None, top_p=None):
    """Probabilities of the tokens by the definition, padding (id 0) left out."""
    scores = np.exp(LOGITS.astype(float) / temperature)
    scores[0] = 0
    order = sorted(range(len(scores)), key=lambda i: -scores[i])[:top_k]
    total, kept = sum(scores[i] for i in order), 0.0
    probs = np.zeros(len(scores))
    for i in order:
        if top_p is None or kept < top_p * total:
            probs[i] = scores[i]
            kept += scores[i]
    return probs / probs.sum()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.5},
        {"top_k": 3},
        {"top_k": 100},
        {"top_p": 0.7},
        {"top_p": 1.0},
        {"top_p": 1e-6},
        {"temperature": 2.0, "top_k": 4, "top_p": 0.6},
    ],
)
def test_tokens_come_as_often_as_they_should(options):
    tokens, log_prob = draws(**options)
    probs = distribution(**options)
    counts = np.bincount(tokens, minlength=len(probs))
    assert np.all(counts[probs == 0] == 0)
    error = np.sqrt(ROWS * probs * (1 - probs)) + 1
    assert np.all(np.abs(counts - ROWS * probs) < 5 * error), (counts, ROWS * probs)
    # Scores are the model's own, whatever was cut; padding had its share there.
    exact = LOGITS - np.log(np.exp(LOGITS).sum())
    np.testing.assert_allclose(log_prob, exact[tokens], rtol=1e-4)


def test_seeds_repeat_and_differ():
    model = small(num_decoder_layers=1, num_experts=0)
    ids = np.repeat(sources(2), 8, axis=0)
    draw = tf.function(
        lambda seed: sample_decode(model, ids, 5, BOS, EOS, seed, top_k=5)[0],
        jit_compile=True,
        autograph=False,
    )
    first = draw(tf.constant([1, 2])).numpy()
    np.testing.assert_array_equal(first, draw(tf.constant([1, 2])))
    np.testing.assert_array_equal(
        first, sample_decode(model, ids, 5, BOS, EOS, [1, 2], top_k=5)[0]
    )
    assert np.any(first != draw(tf.constant([1, 3])).numpy())
    assert len(np.unique(first[:8], axis=0)) > 4  # one source, many samples
    # The step has its part in the numbers: no two columns alike.
    assert np.any(first[:, 0] != first[:, 1])


def test_the_most_probable_one_is_greedy():
    model, ids = small(num_decoder_layers=1, num_experts=0), sources()
    greedy, log_prob = greedy_decode(model, ids, 7, BOS, EOS)
    sampled, same = sample_decode(model, ids, 7, BOS, EOS, [0, 0], top_k=1)
    np.testing.assert_array_equal(sampled, greedy)
    np.testing.assert_allclose(same, log_prob, rtol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"temperature": 0}, "temperature=0"),
        ({"top_k": 0}, "top_k=0"),
        ({"top_p": 0}, "top_p=0"),
        ({"top_p": 1.5}, "top_p=1.5"),
        ({"seed": 3}, "seed=3"),
        ({"seed": [0.5, 1.0]}, "seed="),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=f"Received: .*{message}"):
        sample_decode(
            Fixed(LOGITS), sources(1), 3, BOS, EOS, **{"seed": [0, 0]} | arguments
        )
