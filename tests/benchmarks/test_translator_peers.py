"""Each peer of the translator gets the same sentences, batched as its users do it."""

import numpy as np
import pytest

from benchmarks import translator_peers as peers


@pytest.fixture(scope="module")
def pairs():
    draw = np.random.default_rng(0)
    lengths = draw.integers(2, 65, size=(300, 2))
    return [tuple(draw.integers(4, 90, size=n) for n in row) for row in lengths]


def test_batches_by_length_hold_every_pair_once(pairs):
    batches = peers.by_length(pairs, 512)
    assert sorted(map(id, sum(batches, []))) == sorted(map(id, pairs))
    for batch in batches:
        assert len(batch) * max(len(ids) for pair in batch for ids in pair) <= 512
    positions = sum(len(b) * max(len(i) for p in b for i in p) for b in batches)
    # Sentences of like lengths: less padding than one batch of all has.
    assert positions < 0.75 * 300 * 64


def test_batches_of_one_length_are_of_one_size(pairs):
    batches = peers.of_lengths(pairs, 512)
    kept = [id(pair) for _, batch in batches for pair in batch]
    assert len(kept) == len(set(kept)) > 200
    for length, batch in batches:
        assert len(batch) == 512 // length
        longest = max(len(ids) for pair in batch for ids in pair)
        assert longest <= length < 2 * longest + 16


def test_useful_tokens_are_no_padding_and_no_bos():
    batch = [(np.arange(4, 7), np.arange(4, 9)), (np.arange(4, 5), np.arange(4, 6))]
    assert peers.count([batch]) == 3 + 4 + 1 + 1
    assert peers.padded([s for s, _ in batch]).tolist() == [[4, 5, 6], [4, 0, 0]]
    assert peers.padded([batch[1][0]], 3).tolist() == [[4, 0, 0]]


def test_every_peer_says_what_it_needs():
    assert set(peers.PACKAGES) == set(peers.SIDES) - {"ours"}
