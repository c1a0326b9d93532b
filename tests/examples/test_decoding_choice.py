"""The choice of beam size and length penalty, with a model that is not trained."""

import json

import keras
import numpy as np
import pytest
from sacrebleu.metrics import CHRF

from gshard_examples.translation import decoding_choice
from gshard_examples.translation.corpus import Pair
from gshard_examples.translation.decoding_choice import (
    Decoding,
    choose_decoding,
    chosen_at,
    decoding_of,
    dev_pairs,
    write_choice,
)
from gshard_examples.translation.evaluate import choose
from gshard_examples.translation.model import make_model
from gshard_examples.translation.settings import Settings
from gshard_examples.translation.translator import Translator
from gshard_examples.translation.vocabulary import EOS


@pytest.fixture(scope="module")
def model(toy_vocabulary):
    keras.utils.set_random_seed(1)
    settings = Settings(
        encoder_layers=1,
        decoder_layers=1,
        model_dim=32,
        hidden_dim=48,
        heads=2,
        experts=0,
        partitions=0,
    )
    model = make_model(settings, toy_vocabulary)
    model.set_weights([1.5 * weight for weight in model.get_weights()])
    # Sentences end now and then, so that the length penalty matters.
    end = model.source_embedding.weights[0].numpy()[EOS]
    model.decoder_norm.beta.assign(5.5 * end / np.sum(end**2))
    return model


@pytest.fixture(scope="module")
def pairs(toy_corpus):
    return choose(toy_corpus.read("train"), 12, None, 0)


def said_by(model, vocabulary, pairs, decoding):
    """The translations of the search itself."""
    translator = Translator(
        model, vocabulary, beam_size=decoding.beam_size, alpha=decoding.alpha
    )
    return translator.translate([p.lang for p in pairs], [p.source for p in pairs])


@pytest.fixture(scope="module")
def searched(model, toy_vocabulary, pairs):
    ways = [Decoding(1), *(Decoding(4, alpha) for alpha in (0.0, 1.0, 3.0))]
    return {way: said_by(model, toy_vocabulary, pairs, way) for way in ways}


@pytest.fixture(autouse=True)
def each_search_once(monkeypatch, searches):
    """The same model, sources and beam size: what a search found before."""
    search = decoding_choice._beams

    def once(translator, pairs):
        key = (translator.beam_size, *(pair.source for pair in pairs))
        if key not in searches:
            searches[key] = search(translator, pairs)
        return searches[key]

    monkeypatch.setattr(decoding_choice, "_beams", once)


@pytest.fixture(scope="module")
def searches():
    return {}


@pytest.mark.slow
def test_the_searches_differ(searched):
    """Else the tests below could not fail."""
    assert len({tuple(texts) for texts in searched.values()}) == len(searched)


def test_the_best_is_what_the_search_itself_says(
    model, toy_vocabulary, pairs, searched
):
    """For each way, pairs whose English is that way's: it must be chosen."""
    for way, texts in searched.items():
        wanted = [
            Pair(p.lang, p.domain, p.source, text)
            for p, text in zip(pairs, texts, strict=True)
        ]
        choice = choose_decoding(
            model, toy_vocabulary, wanted, beam_sizes=(1, 4), alphas=(0.0, 1.0, 3.0)
        )
        assert choice.best == way
        assert choice.pairs == len(pairs) and len(choice.chrf) == 4
        for other, said in searched.items():
            chrf = CHRF().corpus_score(said, [texts]).score
            assert choice.chrf[other] == pytest.approx(chrf, abs=0.01)


def test_of_equals_the_fastest_is_taken(model, toy_vocabulary, pairs, monkeypatch):
    monkeypatch.setattr(decoding_choice, "overall_chrf", lambda pairs, texts: 20.0)
    choice = choose_decoding(
        model, toy_vocabulary, pairs, beam_sizes=(1, 4), alphas=(1.0,)
    )
    assert choice.best == Decoding(1)


def test_pairs_are_of_the_dev_split_and_of_all_languages(toy_corpus, toy_vocabulary):
    languages = toy_vocabulary.languages
    found = dev_pairs(toy_corpus, languages, most=10)
    assert len(found) == 10 and found == dev_pairs(toy_corpus, languages, most=10)
    assert set(found) <= set(toy_corpus.read("dev"))
    assert {p.lang for p in found} == {p.lang for p in toy_corpus.read("dev")}
    assert {p.lang for p in dev_pairs(toy_corpus, ["de"])} == {"de"}


def test_what_a_run_decodes_with(tmp_path):
    assert decoding_of(tmp_path) == Decoding(4, 0.8)
    assert chosen_at(tmp_path) is None
    chrf = {Decoding(1): 20.0, Decoding(2, 1.2): 21.5}
    choice = decoding_choice.Choice(Decoding(2, 1.2), chrf, 7)
    write_choice(tmp_path, choice, step=300)
    assert chosen_at(tmp_path) == 300
    assert decoding_of(tmp_path) == Decoding(2, 1.2)
    assert decoding_of(tmp_path, beam_size=1) == Decoding(1, 1.2)
    assert decoding_of(tmp_path, alpha=0.5) == Decoding(2, 0.5)
    record = json.loads((tmp_path / "decoding.json").read_text())
    assert record["split"] == "dev" and record["pairs"] == 7
    assert record["tried"][1] == {"beam_size": 2, "alpha": 1.2, "chrf": 21.5}
    assert str(decoding_of(tmp_path)) == "beam 2, alpha 1.2"


def test_there_must_be_known_pairs(model, toy_vocabulary):
    with pytest.raises(ValueError, match="0 pairs"):
        choose_decoding(model, toy_vocabulary, [])
    with pytest.raises(ValueError, match="'xx'"):
        choose_decoding(model, toy_vocabulary, [Pair("xx", "toy", "a", "a")])
