import json

import numpy as np
import pytest
import sacrebleu

from gshard_examples.translation import baselines
from gshard_examples.translation.baselines import (
    TranslationMemory,
    copy_source,
    translate_with_apertium,
    unigram_cross_entropy,
)
from gshard_examples.translation.corpus import Pair
from gshard_examples.translation.report import plot_scores
from gshard_examples.translation.score import (
    format_table,
    overall_chrf,
    score,
    write_scores,
)

PAIRS = [
    Pair("de", "django", "Die rote Katze", "The red cat sits here"),
    Pair("de", "pycountry", "Freistaat Bayern", "Free State of Bavaria"),
    Pair("ru", "django", "Красная кошка", "The red cat is here"),
    Pair("sr_Latn", "gramps", "Crvena mačka", "A red cat was here"),
]


def test_scores_are_sacrebleus():
    said = ["The red cat sits", "Free State", "A red cat", "A red cat was here"]
    result = score(PAIRS, said, {"de": 20_000, "ru": 1_000})
    wanted = [pair.english for pair in PAIRS]
    assert result["overall"] == {
        "pairs": 4,
        "bleu": round(sacrebleu.corpus_bleu(said, [wanted]).score, 2),
        "chrf": round(sacrebleu.corpus_chrf(said, [wanted]).score, 2),
    }
    assert result["language"]["sr_Latn"]["chrf"] == 100.0
    german = sacrebleu.corpus_chrf(said[:2], [wanted[:2]]).score
    assert result["language"]["de"]["chrf"] == round(german, 2)

    def sizes(grouping):
        return {group: cell["pairs"] for group, cell in result[grouping].items()}

    assert sizes("domain") == {
        "messages": 3,
        "names": 1,
        "from django": 2,
        "from gramps": 1,
        "from pycountry": 1,
    }
    assert sizes("family") == {"Germanic": 2, "Slavic": 2}
    assert sizes("script") == {"Latn": 3, "Cyrl": 1}
    assert list(sizes("resources").values()) == [2, 1, 1]
    assert "resources" not in score(PAIRS, said)


def test_perfect_and_empty_translations():
    wanted = [pair.english for pair in PAIRS]
    assert score(PAIRS, wanted)["overall"]["bleu"] == 100.0
    assert score(PAIRS, [""] * 4)["overall"] == {"pairs": 4, "bleu": 0.0, "chrf": 0.0}


@pytest.mark.parametrize(
    ("pairs", "said", "match"),
    [(PAIRS, ["a"], "4 pairs, 1 translations"), ([], [], "0 pairs")],
)
def test_what_cannot_be_scored(pairs, said, match):
    with pytest.raises(ValueError, match=match):
        score(pairs, said)


def test_chrf_alone():
    said = copy_source(PAIRS)
    assert overall_chrf(PAIRS, said) == score(PAIRS, said)["overall"]["chrf"]


def test_table_json_and_plot(tmp_path):
    scores = {
        "copy": score(PAIRS, copy_source(PAIRS)),
        "best": score(PAIRS, [pair.english for pair in PAIRS]),
    }
    table = format_table(scores, ("domain", "family")).splitlines()
    assert table[0].split() == "chrF / BLEU pairs copy best".split()
    assert table[2].split()[:2] == ["all", "4"]
    assert table[2].split()[-3:] == ["100.0", "/", "100.0"]
    assert max(map(len, table)) < 60  # a third system still fits
    assert any(line.startswith("Germanic") for line in table)
    write_scores(tmp_path / "scores.json", scores)
    assert json.loads((tmp_path / "scores.json").read_text()) == scores
    for name in ("plot.png", "plot.svg"):
        plot_scores(tmp_path / name, {"A test": scores, "Another": scores}, "family")
        assert (tmp_path / name).stat().st_size > 1_000
    picture = (tmp_path / "plot.svg").read_text("utf-8")
    assert picture.count("<!-- Germanic (") == 2
    assert "<!-- A test -->" in picture and "<!-- Another -->" in picture
    for options, match in (
        ({"grouping": "colour"}, "colour"),
        ({"metric": "comet"}, "comet"),
        ({"grouping": "resources"}, "no scores by resources"),
    ):
        with pytest.raises(ValueError, match=match):
            plot_scores(tmp_path / "no.png", {"A test": scores}, **options)
    with pytest.raises(ValueError, match="colour"):
        format_table(scores, ("colour",))
    with pytest.raises(ValueError, match="a system to show"):
        format_table({})


def test_translation_memory():
    training = [
        Pair("de", "d", "Datei öffnen", "Open the file"),
        Pair("de", "d", "Datei schließen", "Close the file"),
        Pair("fr", "d", "Dateien schließen", "of another language"),
    ]
    asked = [
        Pair("de", "d", "Dateien schließen", "?"),
        Pair("de", "d", "Eine Datei öffnen!", "?"),
        Pair("de", "d", "xyz", "?"),
        Pair("ru", "d", "Открыть", "?"),
    ]
    assert TranslationMemory(training).translate(asked) == [
        "Close the file",
        "Open the file",
        "xyz",
        "Открыть",
    ]


def test_unigram_cross_entropy():
    ids = np.array([3, 3, 4, 5])
    # With no smoothing to speak of, the entropy of (1/2, 1/4, 1/4): 1.5 bits.
    entropy = unigram_cross_entropy(ids, ids, 6, smoothing=1e-12)
    assert entropy == pytest.approx(1.5 * np.log(2))
    # An unseen symbol costs log((4 + 6) / 1).
    assert unigram_cross_entropy(ids, np.array([0]), 6) == pytest.approx(np.log(10))
    with pytest.raises(ValueError, match="smoothing=0"):
        unigram_cross_entropy(ids, ids, 6, smoothing=0)
    with pytest.raises(ValueError, match="0 ids"):
        unigram_cross_entropy(ids, ids[:0], 6)


def apertium_program(folder, monkeypatch, script):
    program = folder / "apertium"
    program.write_text("#!/bin/sh\n" + script)
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=":")


def test_apertium_not_installed(monkeypatch):
    monkeypatch.setattr(baselines.shutil, "which", lambda name: None)
    result = translate_with_apertium(PAIRS)
    assert result.translations == [] == result.positions
    assert result.skipped["de"] == "the program apertium is not installed"


def test_apertium_by_a_stand_in(tmp_path, monkeypatch):
    """The program's place is taken by a script, so this runs without it."""
    script = 'if [ "$1" = -l ]; then echo "  hbs-eng"; else tr a-z A-Z; fi\n'
    apertium_program(tmp_path, monkeypatch, script)
    pairs = [*PAIRS, Pair("mk", "d", "нешто", "thing"), Pair("hr", "d", "b", "c")]
    result = translate_with_apertium(pairs)
    assert sorted(zip(result.positions, result.translations, strict=True)) == [
        (3, "CRVENA MAčKA"),
        (5, "B"),
    ]
    assert result.skipped == {
        "de": "Apertium has no pair into English",
        "ru": "Apertium has no pair into English",
        "mk": "Apertium's pair mkd-eng is not installed",
    }
    apertium_program(tmp_path, monkeypatch, "echo broken >&2; exit 1\n")
    with pytest.raises(OSError, match="broken"):
        translate_with_apertium(pairs)


@pytest.mark.skipif(not baselines.shutil.which("apertium"), reason="needs Apertium")
def test_apertium_itself():
    pairs = [Pair("es", "d", "El gato rojo.", "?"), Pair("es", "d", "La casa.", "?")]
    result = translate_with_apertium(pairs)
    if not result.skipped:
        assert result.translations == ["The red cat.", "The house."]
