import numpy as np
import pytest

from gshard_examples.translation.corpus import Pair
from gshard_examples.translation.tokens import tokenize_pairs, tokenize_split
from gshard_examples.translation.vocabulary import BOS, EOS


@pytest.fixture(scope="module")
def train(toy_corpus, toy_vocabulary):
    return tokenize_split(toy_corpus, "train", toy_vocabulary)


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


def test_cutting_keeps_the_end(train):
    cut = train.cut(6, 4)
    for i in range(len(train)):
        for name, most in (("source", 6), ("target", 5)):
            (start, stop), (cut_start, cut_stop) = (
                vars(tokens)[f"{name}_starts"][i : i + 2] for tokens in (train, cut)
            )
            whole = vars(train)[name][start:stop].tolist()
            left = whole if len(whole) <= most else [*whole[: most - 1], EOS]
            assert vars(cut)[name][cut_start:cut_stop].tolist() == left
    assert cut.source_lengths.max() == 6 and cut.target_lengths.max() == 4
    whole = train.cut(10**6, 10**6)
    assert all(
        np.array_equal(vars(whole)[n], value) for n, value in vars(train).items()
    )


def test_bad_languages(toy_corpus, toy_vocabulary):
    with pytest.raises(ValueError, match="'xq'"):
        tokenize_split(toy_corpus, "train", toy_vocabulary, ["xq"])
    with pytest.raises(ValueError, match="0 pairs"):
        tokenize_pairs([], toy_vocabulary)
    with pytest.raises(ValueError, match="'xq'"):
        tokenize_pairs([Pair("xq", "d", "a", "b")], toy_vocabulary)
