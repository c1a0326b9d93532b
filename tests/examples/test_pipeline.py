import itertools
from collections import Counter

import numpy as np
import pytest

from gshard_examples.translation.corpus import Pair
from gshard_examples.translation.pipeline import (
    Batches,
    make_dataset,
    tokenize_pairs,
    tokenize_split,
)
from gshard_examples.translation.vocabulary import BOS, EOS, PAD

BUCKETS = (8, 16, 64)


@pytest.fixture(scope="module")
def train(toy_corpus, toy_vocabulary):
    return tokenize_split(toy_corpus, "train", toy_vocabulary)


def flat(batch):
    (source, target_in), target_out, weight = batch
    return [np.asarray(part) for part in (source, target_in, target_out, weight)]


def same(one, other):
    return all(
        np.array_equal(a, b) for a, b in zip(flat(one), flat(other), strict=True)
    )


def test_tokens_are_those_of_the_vocabulary(toy_corpus, toy_vocabulary, train):
    pairs = toy_corpus.read("train")
    assert len(train) == len(pairs)
    for i in (0, 1, len(pairs) // 2, len(pairs) - 1):
        (source,) = toy_vocabulary.encode_source([pairs[i].lang], [pairs[i].source])
        start, stop = train.source_starts[i : i + 2]
        assert train.source[start:stop].tolist() == source.numpy().tolist()
        (target,) = toy_vocabulary.encode_target([pairs[i].english])
        start, stop = train.target_starts[i : i + 2]
        assert train.target[start:stop].tolist() == target.numpy().tolist()
        assert train.languages[train.language[i]] == pairs[i].lang
    assert BOS not in train.predicted_ids()
    assert len(train.predicted_ids()) == train.target_lengths.sum()


def test_cache(toy_corpus, toy_vocabulary, train, tmp_path):
    made, cached = (
        tokenize_split(toy_corpus, "train", toy_vocabulary, cache=tmp_path)
        for _ in range(2)
    )
    assert len(list(tmp_path.iterdir())) == 1
    for name, value in vars(train).items():
        for other in (made, cached):
            assert np.array_equal(vars(other)[name], value)
    german = tokenize_split(toy_corpus, "train", toy_vocabulary, ["de"], tmp_path)
    assert german.languages == ("de",)
    assert len(list(tmp_path.iterdir())) == 2


def test_training_batches(train):
    batches = Batches(train, batch_tokens=256, buckets=BUCKETS)
    assert batches.shapes == [(32, 8), (16, 16), (8, 64)]
    for batch in itertools.islice(batches, 40):
        source, target_in, target_out, weight = flat(batch)
        assert source.shape in batches.shapes
        assert source.dtype == target_in.dtype == target_out.dtype == np.int32
        assert weight.dtype == np.float32
        assert source.shape == target_in.shape == target_out.shape == weight.shape
        assert np.array_equal(weight, target_out != PAD)
        assert (target_in[:, 0] == BOS).all()
        # What goes in at a step is what should have come out at the last.
        shifted = np.where(target_out[:, :-1] == EOS, PAD, target_out[:, :-1])
        assert np.array_equal(target_in[:, 1:], shifted)
        assert ((source == EOS).sum(axis=1) == 1).all()
        assert ((target_out == EOS).sum(axis=1) == 1).all()


def test_every_row_goes_to_the_smallest_bucket(train):
    batches = Batches(train, batch_tokens=256, buckets=BUCKETS)
    lengths = np.maximum(train.source_lengths, train.target_lengths)
    for rows in batches.plan(0):
        length = batches.batch(rows)[1].shape[1]
        smaller = [b for b in BUCKETS if b < length]
        assert lengths[rows].max() <= length
        assert lengths[rows].min() > max(smaller, default=0)


def test_order_is_a_function_of_seed_and_epoch(train):
    def plan(seed, epoch):
        batches = Batches(train, 256, BUCKETS, seed=seed)
        return np.concatenate(batches.plan(epoch)).tolist()

    assert plan(1, 3) == plan(1, 3)
    assert plan(1, 3) != plan(1, 4)
    assert plan(1, 3) != plan(2, 3)


@pytest.mark.parametrize("offset", [0, 1, 5])
def test_going_on_in_the_middle(train, offset):
    batches = Batches(train, 256, BUCKETS, seed=7)
    start = batches.steps(0) + offset  # in the second epoch
    whole = list(itertools.islice(batches, start + 4))
    rest = list(
        itertools.islice(Batches(train, 256, BUCKETS, seed=7).from_step(start), 4)
    )
    assert all(same(a, b) for a, b in zip(whole[start:], rest, strict=True))
    assert batches.locate(start) == (1, offset)


def test_evaluation_sees_every_pair_once(toy_corpus, toy_vocabulary):
    tokens = tokenize_split(toy_corpus, "test", toy_vocabulary)
    batches = Batches(tokens, 512, BUCKETS, training=False)
    assert sorted(batches.rows()) == list(range(len(tokens)))
    made = list(batches)
    assert len(made) == batches.steps() == int(batches.dataset().cardinality())
    weights = targets = 0
    for batch, rows in zip(made, batches.plan(0), strict=True):
        source, target_in, target_out, weight = flat(batch)
        assert source.shape in batches.shapes
        filler = slice(len(rows), None)
        assert not weight[filler].any()
        assert (source[filler, 0] == EOS).all() and not source[filler, 1:].any()
        assert (target_in[filler, 0] == BOS).all()
        assert not target_out[filler].any()
        weights += weight.sum()
    targets = tokens.target_lengths.sum()
    assert weights == targets


def test_too_long(toy_vocabulary):
    pairs = [Pair("de", "d", "candle " * 40, "garden " * 40), Pair("de", "d", "a", "b")]
    tokens = tokenize_pairs(pairs, toy_vocabulary)
    batches = Batches(tokens, 64, (8, 16), training=False)
    assert batches.too_long == 1
    cut = flat(list(batches)[-1])
    assert cut[0].shape == (8, 16)
    assert cut[0][0, -1] == EOS and (cut[0][0] != PAD).all()
    assert cut[2][0, -1] == EOS and cut[3][0].all()
    with pytest.raises(ValueError, match="as short as the longest bucket"):
        Batches(tokenize_pairs(pairs[:1], toy_vocabulary), 64, (8, 16))
    training = Batches(
        tokenize_pairs(pairs[:1] + pairs[1:] * 8, toy_vocabulary), 64, (8, 16)
    )
    assert all(0 not in rows for rows in training.plan(0))


def test_temperature_lifts_small_languages(toy_vocabulary):
    pairs = [Pair("de", "d", "a b", "c d")] * 3000 + [Pair("fr", "d", "a b", "c d")] * 3
    tokens = tokenize_pairs(pairs, toy_vocabulary)
    seen = {}
    for temperature in (1.0, 5.0):
        batches = Batches(tokens, 64, (8,), temperature=temperature)
        counts = Counter(tokens.language[np.concatenate(batches.plan(0))].tolist())
        seen[temperature] = counts[1] / counts.total()
        assert counts.total() >= 2990
    assert seen[1.0] == pytest.approx(3 / 3003, abs=1e-3)
    assert seen[5.0] == pytest.approx(1 / (1 + 1000**0.2), abs=0.01)


def test_with_temperature_1_an_epoch_is_every_pair_once(train):
    batches = Batches(train, 64, BUCKETS, temperature=1.0, seed=1)
    counts = Counter(np.concatenate(batches.plan(0)).tolist())
    assert max(counts.values()) == 1
    # Less the pairs left over in each bucket, and one per language for rounding.
    lost = sum(batches.batch_sizes) + len(train.languages)
    assert len(counts) >= len(train) - batches.too_long - lost


def test_dataset(toy_corpus, toy_vocabulary, train):
    dataset = make_dataset(
        toy_corpus, "train", toy_vocabulary, 256, (8, 16), max_length=64, seed=3
    )
    batches = Batches(train, 256, BUCKETS, seed=3)
    for one, other in zip(dataset.take(12), batches, strict=False):
        assert same(one, other)
    later = batches.dataset(start_step=5)
    assert same(next(iter(later)), next(batches.from_step(5)))


def test_the_order_of_batches_without_shuffling(train):
    batches = Batches(train, 256, BUCKETS, shuffle=False)
    lengths = [batches.batch(rows)[1].shape[1] for rows in batches.plan(0)]
    assert lengths == sorted(lengths)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"buckets": ()}, r"buckets=\(\)"),
        ({"buckets": (32, 16)}, "increasing"),
        ({"buckets": (2,)}, "buckets="),
        ({"batch_tokens": 4}, "batch_tokens=4"),
        ({"batch_tokens": 10**9}, "lower batch_tokens"),
        ({"temperature": 0.0}, "temperature=0.0"),
    ],
)
def test_bad_options(train, options, match):
    with pytest.raises(ValueError, match=match):
        Batches(train, **({"batch_tokens": 256, "buckets": BUCKETS} | options))


def test_bad_languages(toy_corpus, toy_vocabulary):
    with pytest.raises(ValueError, match="'xq'"):
        tokenize_split(toy_corpus, "train", toy_vocabulary, ["xq"])
    with pytest.raises(ValueError, match="0 pairs"):
        tokenize_pairs([], toy_vocabulary)
