import itertools
from collections import Counter

import keras
import numpy as np
import pytest

from gshard_examples.translation.corpus import Pair
from gshard_examples.translation.packed_batches import (
    PackedBatches,
    batch_spec,
    choose_row_lengths,
)
from gshard_examples.translation.tokens import tokenize_pairs, tokenize_split
from gshard_examples.translation.vocabulary import BOS, EOS, PAD, UNK

ROWS = (48, 40)


@pytest.fixture(scope="module")
def train(toy_corpus, toy_vocabulary):
    return tokenize_split(toy_corpus, "train", toy_vocabulary)


def flat(batch):
    inputs, target_out, weight = batch
    return [*(inputs[name] for name in sorted(inputs)), target_out, weight]


def same(one, other):
    return all(
        np.array_equal(a, b) for a, b in zip(flat(one), flat(other), strict=True)
    )


def pairs_of(batch):
    """(source ids, decoder input, labels) of each segment, and checks of the rest."""
    inputs, target_out, weight = batch
    assert np.array_equal(weight, target_out != PAD)
    for row in range(len(target_out)):
        source, target = inputs["source"][row], inputs["target"][row]
        sources = inputs["source_segment_ids"][row]
        targets = inputs["target_segment_ids"][row]
        assert set(sources) | {0} == set(targets) | {0} == set(range(sources.max() + 1))
        assert np.array_equal(sources != 0, source != PAD)
        assert np.array_equal(targets != 0, target != PAD)
        for segment in range(1, sources.max() + 1):
            yield (
                source[sources == segment].tolist(),
                target[targets == segment].tolist(),
                target_out[row][targets == segment].tolist(),
            )
        assert not target_out[row][targets == 0].any()


def sentences(tokens, pairs):
    """The same, of pairs of the split."""
    for i in pairs:
        source = tokens.source[slice(*tokens.source_starts[i : i + 2])].tolist()
        target = tokens.target[slice(*tokens.target_starts[i : i + 2])].tolist()
        yield source, target[:-1], target[1:]


def test_training_batches_hold_the_pairs_of_the_plan(train):
    batches = PackedBatches(train, ROWS, batch_tokens=384)
    assert batches.shapes == ((8, 48), (8, 40))
    plan = batches.plan(0)
    assert batches.steps() >= 5
    for number, batch in enumerate(itertools.islice(batches, batches.steps())):
        inputs, target_out, weight = batch
        assert inputs["source"].shape == inputs["source_segment_ids"].shape == (8, 48)
        assert inputs["target"].shape == inputs["target_segment_ids"].shape == (8, 40)
        assert target_out.shape == weight.shape == (8, 40)
        assert {a.dtype.name for a in [*inputs.values(), target_out]} == {"int32"}
        assert weight.dtype == np.float32
        rows = plan.select(np.arange(8 * number, 8 * number + 8))
        found = list(pairs_of(batch))
        assert found == list(sentences(train, rows.examples))
        for source, target_in, labels in found:
            assert source[-1] == labels[-1] == EOS and target_in[0] == BOS
            assert target_in[1:] == labels[:-1]


def test_order_is_a_function_of_seed_and_epoch(train):
    def plan(seed, epoch):
        return PackedBatches(train, ROWS, 384, seed=seed).plan(epoch).examples.tolist()

    assert plan(1, 3) == plan(1, 3)
    assert plan(1, 3) != plan(1, 4)
    assert plan(1, 3) != plan(2, 3)


@pytest.mark.parametrize("offset", [0, 1, 5])
def test_going_on_in_the_middle(train, offset):
    batches = PackedBatches(train, ROWS, 384, seed=7)
    start = batches.steps(0) + offset  # in the second epoch
    whole = list(itertools.islice(batches, start + 4))
    again = PackedBatches(train, ROWS, 384, seed=7)
    rest = list(itertools.islice(again.from_step(start), 4))
    assert all(same(a, b) for a, b in zip(whole[start:], rest, strict=True))
    assert batches.locate(start) == (1, offset)
    with pytest.raises(ValueError, match="step=-1"):
        batches.locate(-1)


def test_word_dropout_hides_words_and_nothing_else(train):
    def batches(rate, training=True):
        made = PackedBatches(train, ROWS, 384, training, seed=3, word_dropout=rate)
        return list(itertools.islice(made, 5))

    whole, hidden, again = batches(0.0), batches(0.3), batches(0.3)
    words = dropped = 0
    for one, other, repeated in zip(whole, hidden, again, strict=True):
        assert same(other, repeated)
        # All of it is to be predicted.
        for a, b in zip(one[1:], other[1:], strict=True):
            np.testing.assert_array_equal(a, b)
        for name, ids in one[0].items():
            left = other[0][name]
            if name in ("source", "target"):
                segments = one[0][f"{name}_segment_ids"]
                first = np.diff(segments, axis=1, prepend=0) != 0
                assert not ((left != ids) & (first | (ids <= EOS))).any()
                assert set(left[left != ids]) <= {UNK}
                words += np.sum(~first & (ids > EOS))
                dropped += np.sum(left != ids)
            else:
                np.testing.assert_array_equal(left, ids)
    assert words > 1000 and abs(dropped / words - 0.3) < 0.05
    for a, b in zip(batches(0.0, False), batches(0.3, False), strict=True):
        assert same(a, b)


def test_evaluation_sees_every_pair_once(toy_corpus, toy_vocabulary):
    tokens = tokenize_split(toy_corpus, "test", toy_vocabulary)
    batches = PackedBatches(tokens, ROWS, 384, training=False)
    assert sorted(batches.plan().examples) == list(range(len(tokens)))
    made = list(batches)
    assert len(made) == batches.steps() == int(batches.dataset().cardinality())
    found = [pair for batch in made for pair in pairs_of_real_rows(batch)]
    assert sorted(found) == sorted(sentences(tokens, range(len(tokens))))
    assert sum(w.sum() for _, _, w in made) == tokens.target_lengths.sum()
    # Rows that fill the last batch up: attention sees something, the loss nothing.
    filler = len(batches.plan()) % 8
    assert filler, "another toy corpus: choose other rows"
    inputs, target_out, weight = made[-1]
    assert (inputs["source"][filler:, 0] == EOS).all()
    assert (inputs["target"][filler:, 0] == BOS).all()
    for name in ("source", "target"):
        assert (inputs[f"{name}_segment_ids"][filler:, 0] == 1).all()
        assert not inputs[f"{name}_segment_ids"][filler:, 1:].any()
    assert not target_out[filler:].any() and not weight[filler:].any()


def pairs_of_real_rows(batch):
    return [pair for pair in pairs_of(batch) if pair[2][0] != PAD]


def test_too_long(toy_vocabulary):
    pairs = [Pair("de", "d", "candle " * 40, "garden " * 40), Pair("de", "d", "a", "b")]
    tokens = tokenize_pairs(pairs, toy_vocabulary)
    batches = PackedBatches(tokens, (16, 12), 64, training=False)
    assert batches.too_long == 1
    [batch] = batches
    source, target_in, labels = next(pairs_of(batch))
    assert (len(source), len(labels)) == (16, 12)
    assert source[-1] == labels[-1] == EOS
    [(whole, _, target)] = sentences(tokens, [0])
    assert source[:-1] == whole[:15] and labels[:-1] == target[:11]
    with pytest.raises(ValueError, match="as short as a row"):
        PackedBatches(tokenize_pairs(pairs[:1], toy_vocabulary), (16, 12), 64)
    many = tokenize_pairs(pairs[:1] + pairs[1:] * 80, toy_vocabulary)
    training = PackedBatches(many, (16, 12), 64)
    assert 0 not in training.plan(0).examples


def test_temperature_lifts_small_languages(toy_vocabulary):
    pairs = [Pair("de", "d", "a b", "c d")] * 3000 + [Pair("fr", "d", "a b", "c d")] * 3
    tokens = tokenize_pairs(pairs, toy_vocabulary)
    seen = {}
    for temperature in (1.0, 5.0):
        batches = PackedBatches(tokens, (32, 32), 256, temperature=temperature)
        counts = Counter(tokens.language[batches.plan(0).examples].tolist())
        seen[temperature] = counts[1] / counts.total()
        assert counts.total() >= 2950
    assert seen[1.0] == pytest.approx(3 / 3003, abs=1e-3)
    assert seen[5.0] == pytest.approx(1 / (1 + 1000**0.2), abs=0.01)


def test_with_temperature_1_an_epoch_is_every_pair_once(train):
    batches = PackedBatches(train, ROWS, 384, temperature=1.0, seed=1)
    counts = Counter(batches.plan(0).examples.tolist())
    assert max(counts.values()) == 1
    # Less the rows that fill no batch (of at most 10 pairs), and one per language for
    # rounding.
    assert len(counts) >= len(train) - batches.too_long - 7 * 10 - len(train.languages)


def test_both_sides_are_filled(train):
    lengths = choose_row_lengths(train)
    assert lengths[0] == 64
    summary = PackedBatches(train, lengths, 512).summary()
    # A toy: few pairs, and no short ones to fill the gaps.
    assert min(summary["source_fill"], summary["target_fill"]) >= 0.9
    assert summary["rows"] == 8 and summary["row_lengths"] == lengths
    # Counted in the batches themselves.
    batches = PackedBatches(train, lengths, 512)
    epoch = list(itertools.islice(batches, batches.steps()))
    for name in ("source", "target"):
        used = np.mean([batch[0][f"{name}_segment_ids"] != 0 for batch in epoch])
        assert summary[f"{name}_fill"] == pytest.approx(used)


def test_row_lengths_follow_the_pairs_that_are_drawn(toy_vocabulary):
    short = Pair("de", "d", "a b c d", "a b c d")
    longer = Pair("fr", "d", "a b c d " * 6, "a b")
    tokens = tokenize_pairs([short] * 1000 + [longer] * 10, toy_vocabulary)
    source, target = tokens.source_lengths, tokens.target_lengths
    share = 1 / (1 + 100**0.2)  # of the second language
    ratio = ((1 - share) * target[0] + share * target[-1]) / (
        (1 - share) * source[0] + share * source[-1]
    )
    assert choose_row_lengths(tokens) == (64, round(64 * ratio))
    # Sentences that do not fit make the rows longer.
    long = Pair("de", "d", "a b c d " * 20, "a b c d " * 20)
    tokens = tokenize_pairs([short] * 80 + [long] * 20, toy_vocabulary)
    assert 64 < tokens.source_lengths.max() <= 128
    assert choose_row_lengths(tokens)[0] == 128


def test_dataset(train):
    batches = PackedBatches(train, ROWS, 384, seed=3)
    dataset = batches.dataset()
    assert dataset.element_spec == batch_spec(ROWS, 384)
    for one, other in zip(dataset.take(12), batches, strict=False):
        assert same(one, other)
    later = batches.dataset(start_step=5)
    assert same(next(iter(later)), next(batches.from_step(5)))


def test_a_packed_loss_is_that_of_the_sentences(toy_corpus, toy_vocabulary):
    """Nats per target token, as the model gives them sentence by sentence."""
    from gshard_examples.translation.model import make_model
    from gshard_examples.translation.settings import Settings

    tokens = tokenize_pairs(toy_corpus.read("test")[:40], toy_vocabulary)
    settings = Settings(
        experts=0,
        model_dim=16,
        hidden_dim=32,
        heads=2,
        encoder_layers=1,
        decoder_layers=1,
    )
    keras.utils.set_random_seed(0)
    model = make_model(settings, toy_vocabulary)
    batches = PackedBatches(tokens, ROWS, 10**4, training=False)
    assert batches.steps() == 1  # Keras averages losses of batches, not of tokens
    measured = model.evaluate(batches.dataset(), verbose=0, return_dict=True)
    nats = []
    for source, target_in, labels in sentences(tokens, range(len(tokens))):
        logits = model((np.array([source]), np.array([target_in])), training=False)
        probabilities = keras.ops.log_softmax(logits[0]).numpy()
        nats += [-float(probabilities[i, label]) for i, label in enumerate(labels)]
    for name in ("nll", "loss"):
        assert measured[name] == pytest.approx(np.mean(nats), rel=1e-5)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"row_lengths": (64,)}, r"row_lengths=\(64,\)"),
        ({"row_lengths": (64, 2)}, "row_lengths="),
        ({"batch_tokens": 4}, "batch_tokens=4"),
        ({"batch_tokens": 10**9}, "lower batch_tokens"),
        ({"temperature": 0.0}, "temperature=0.0"),
    ],
)
def test_bad_options(train, options, match):
    with pytest.raises(ValueError, match=match):
        PackedBatches(train, **({"batch_tokens": 384, "row_lengths": ROWS} | options))
