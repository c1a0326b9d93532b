"""Beam search, cached and compiled, against lists and full passes without a cache."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from decoding_models import BOS, EOS, Fixed, small, sources
from oracles import beam_search as oracle

from benchmarks.decoding.uncached import Uncached
from keras_layers import beam_search, greedy_decode, length_limits

LENGTH = 7


@pytest.fixture(scope="module")
def model():
    # With this seed some outputs end and some do not.
    keras.utils.set_random_seed(3)
    # Little room: a pass in groups would drop tokens, decoding must not.
    return small(moe_every=2, moe_options={"router": {"capacity_factor": 0.5}})


@pytest.fixture(scope="module")
def log_probs_after(model):
    """(source row, prefix) -> log-probabilities `[V]`, by a pass over all of it."""
    forward = tf.function(
        lambda source, target: tf.nn.log_softmax(model((source, target), decoding=True))
    )
    known = {}

    def ask(source, prefix):
        key = (source.tobytes(), tuple(prefix))
        if key not in known:
            target = np.full([1, LENGTH], 0, np.int32)
            target[0, : len(prefix) + 1] = [BOS, *prefix]
            known[key] = forward(source[None], target)[0, len(prefix)].numpy()
        return known[key]

    return ask


def expected(log_probs_after, ids, limits, **options):
    """What the oracle finds for each row, as three arrays."""
    n = options["num_results"]
    found_ids = np.zeros([len(ids), n, LENGTH], int)
    scores = np.full([len(ids), n], -np.inf)
    log_probs = np.full([len(ids), n], -np.inf)
    for b, row in enumerate(ids):
        best = oracle.beam_search(
            lambda prefix, row=row: log_probs_after(row, prefix),
            limits[b],
            EOS,
            0,
            **options,
        )
        for i, (tokens, score, log_prob) in enumerate(best):
            found_ids[b, i, : len(tokens)] = tokens
            scores[b, i], log_probs[b, i] = score, log_prob
    return found_ids, scores, log_probs


@pytest.mark.broad(7)  # the first and the last of eight: all of one are not the other's
@pytest.mark.parametrize(("flat", "compiled"), [(False, True), (True, False)])
@pytest.mark.parametrize("early_stop", [True, False])
@pytest.mark.parametrize(
    ("beam_size", "alpha", "num_results"), [(3, 0.0, 3), (4, 0.8, 2)]
)
def test_it_finds_what_lists_find(
    model, log_probs_after, beam_size, alpha, num_results, early_stop, flat, compiled
):
    ids = sources(4)
    limits = np.array([7, 2, 5, 7])
    options = {
        "beam_size": beam_size,
        "alpha": alpha,
        "num_results": num_results,
        "early_stop": early_stop,
    }
    wanted = expected(log_probs_after, ids, limits, **options)
    assert EOS in wanted[0] and not np.all(np.any(wanted[0] == EOS, axis=-1))

    def search(ids):
        return beam_search(
            model, ids, LENGTH, BOS, EOS, limits=limits, flat=flat, **options
        )

    if compiled:
        search = tf.function(search, jit_compile=True, autograph=False)
    found = search(tf.constant(ids))
    np.testing.assert_array_equal(found.ids, wanted[0])
    np.testing.assert_allclose(found.scores, wanted[1], atol=1e-4)
    np.testing.assert_allclose(found.log_probs, wanted[2], atol=1e-4)


def test_a_beam_of_one_is_greedy(model):
    ids = sources(16, seed=1)
    limits = length_limits(ids, 0, 0.5, 3)
    greedy, log_prob = greedy_decode(model, ids, LENGTH, BOS, EOS, limits=limits)
    assert len(np.unique(np.count_nonzero(greedy, axis=1))) > 1
    found = beam_search(
        model, ids, LENGTH, BOS, EOS, beam_size=1, alpha=1.0, limits=limits
    )
    np.testing.assert_array_equal(found.ids[:, 0], greedy)
    np.testing.assert_allclose(found.log_probs[:, 0], log_prob, rtol=1e-5)


def test_a_row_depends_on_nothing_else_in_the_batch(model):
    ids = sources(3, seed=2)  # of 3, 5 and 3 tokens
    options = {"beam_size": 3, "num_results": 3, "early_stop": False}
    together = beam_search(model, ids, LENGTH, BOS, EOS, **options)
    for b in (0, 1):
        length = np.count_nonzero(ids[b])
        alone = beam_search(model, ids[b : b + 1, :length], LENGTH, BOS, EOS, **options)
        np.testing.assert_array_equal(alone.ids[0], together.ids[b])
        np.testing.assert_allclose(alone.scores[0], together.scores[b], atol=1e-4)


@pytest.mark.parametrize("compiled", [False, True])
def test_ties_go_to_the_first_hypothesis_and_the_lowest_id(compiled):
    # Tokens 3 to 6 are alike, and no more likely than the end.
    logits = np.array([0.0, -9.0, 1.0, 1.0, 1.0, 1.0, 1.0], np.float32)
    row = np.log(np.exp(logits) / np.exp(logits).sum())
    for early_stop in (True, False):
        options = {
            "beam_size": 3,
            "alpha": 1.0,
            "num_results": 3,
            "early_stop": early_stop,
        }

        def search(ids, options=options):
            return beam_search(Fixed(logits), ids, 4, BOS, EOS, **options)

        if compiled:
            search = tf.function(search, jit_compile=True)
        found = search(tf.ones([2, 1], tf.int64))
        best = oracle.beam_search(lambda prefix: row, 4, EOS, 0, **options)
        for i, (tokens, score, _) in enumerate(best):
            padded = [*tokens, 0, 0, 0, 0][:4]
            np.testing.assert_array_equal(found.ids[:, i], [padded, padded])
            np.testing.assert_allclose(found.scores[:, i], score, rtol=1e-5)
        assert found.ids.dtype == tf.int64


def test_where_there_are_too_few_hypotheses():
    # Two tokens besides padding: of length one there is one ended, one growing.
    found = beam_search(
        Fixed([0.0, 0.0, 1.0]), tf.ones([1, 1], tf.int32), 1, BOS, EOS, 4, 0.0, 4
    )
    np.testing.assert_array_equal(found.ids[0, :, 0], [EOS, 1, 0, 0])
    rest = np.log(np.exp([1.0, 0.0]) / (np.e + 2))
    np.testing.assert_allclose(found.scores[0], [*rest, -np.inf, -np.inf], rtol=1e-5)


def test_it_stops_when_every_row_is_done():
    steps = []

    class Counting(Fixed):
        def decode_step(self, tokens, state, index):
            steps.append(int(index))
            return super().decode_step(tokens, state, index)

    likely = np.array([0.0, 0.0, 9.0, 1.0, 0.0], np.float32)
    beam_search(Counting(likely), tf.ones([2, 1], tf.int32), 50, BOS, EOS, 2)
    assert len(steps) < 5
    assert beam_search(
        Counting(likely), tf.ones([0, 1], tf.int32), 50, BOS, EOS, 2
    ).ids.shape == (0, 1, 50)


def test_limits_come_from_the_source():
    ids = [[5, 6, 7, 2, 0, 0], [5, 2, 0, 0, 0, 0]]
    np.testing.assert_array_equal(length_limits(ids, 0, 1.5, 10), [16, 13])
    model = Fixed([0.0, 0.0, -9.0, 1.0, 0.0])
    found, _ = greedy_decode(
        model, tf.constant(ids), 30, BOS, EOS, limits=length_limits(ids)
    )
    np.testing.assert_array_equal(np.count_nonzero(found, axis=1), [16, 13])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"beam_size": 0}, "beam_size=0"),
        ({"alpha": -0.1}, "alpha=-0.1"),
        ({"num_results": 5}, "num_results=5, beam_size=4"),
        ({"max_length": 0}, "max_length=0"),
        ({"eos_id": -1}, "eos_id=-1"),
    ],
)
def test_bad_arguments(arguments, message):
    given = {"max_length": 4, "bos_id": BOS, "eos_id": EOS} | arguments
    with pytest.raises(ValueError, match=f"Received: .*{message}"):
        beam_search(Fixed([0.0, 1.0, 2.0]), sources(1), **given)
    with pytest.raises(ValueError, match="Received: factor=0"):
        length_limits(sources(1), factor=0)


@pytest.mark.slow
def test_a_thousand_sentences_with_and_without_caches(model):
    """Greedy, beam 4 and flat, token for token; scores within 1e-4."""
    ids = sources(1000, seed=5)
    limits = length_limits(ids, 0, 1.0, 3)
    options = {"limits": limits, "num_results": 4}

    def greedy(decoded):
        return greedy_decode(decoded, ids, 9, BOS, EOS, limits=limits)

    def search(decoded, flat=False):
        return beam_search(decoded, ids, 9, BOS, EOS, flat=flat, **options)

    def run(function, *arguments):
        return [x.numpy() for x in tf.function(lambda: function(*arguments))()]

    cached, uncached = run(greedy, model), run(greedy, Uncached(model))
    np.testing.assert_array_equal(cached[0], uncached[0])
    np.testing.assert_allclose(cached[1], uncached[1], atol=1e-4)
    uncached = run(search, Uncached(model))
    assert np.any(uncached[0] == EOS) and not np.all(np.any(uncached[0] == EOS, -1))
    for flat in (False, True):
        cached = run(search, model, flat)
        np.testing.assert_array_equal(cached[0], uncached[0])
        np.testing.assert_allclose(cached[1], uncached[1], atol=1e-4)
