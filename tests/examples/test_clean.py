import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gshard_examples.translation.clean import clean_pair, normalize_text


@pytest.mark.parametrize(
    ("text", "accelerator", "clean"),
    [
        ("_File", "_", "File"),
        ("my_file_name", "_", "my_file_name"),
        ("&File && more", "&", "File && more"),
        ("~File", "~", "File"),
        ("ファイル (_F)", "_", "ファイル"),
        ("A <b>bold</b>\tword\\nand &amp; more", "", "A bold word and & more"),
        ("e\u0301", "", "\u00e9"),
        ("left\u200e right\ufeff", "", "left right"),
    ],
)
def test_markup_goes(text, accelerator, clean):
    assert normalize_text(text, accelerator) == clean


@pytest.mark.parametrize(
    ("source", "english", "pair"),
    [
        ("%s löschen?", "Delete %s?", ("{1} löschen?", "Delete {1}?")),
        (
            "%(b)s besitzt %(a)s",
            "%(a)s belongs to %(b)s",
            ("{2} besitzt {1}", "{1} belongs to {2}"),
        ),
        ("%2$s zu %1$s", "%s to the %s", ("{1} zu {1}", "{1} to the {1}")),
        ("${name} fehlt", "${name} is missing", ("{1} fehlt", "{1} is missing")),
        ("$1 Seiten", "$1 pages", ("{1} Seiten", "{1} pages")),
    ],
)
def test_placeholders_get_the_numbers_of_the_english_side(source, english, pair):
    assert clean_pair("de", source, english) == pair


@pytest.mark.parametrize(
    ("tag", "source", "english", "reason"),
    [
        ("de", "Löschen?", "Delete %s?", "placeholders differ"),
        ("de", "Open", "Open", "untranslated"),
        ("ru", "Open it", "Open the file", "other script"),
        ("de", "x" * 50_000, "Open the file", "too long"),
        ("de", "Datei", "y" * 50_000, "too long"),
        ("de", "Wort " * 300, "Word " * 100, "too long"),
        ("de", "<b></b>", "Open the file", "empty"),
        ("de", "12 345", "12 345 678 x", "few letters"),
        ("de", "Größe von X", "Größe von ÄÖÜ", "english side is not english"),
        ("de", "eine Datei", "etc/file_name.txt", "identifier"),
        ("de", "Ein ziemlich kurzer", "long " * 30, "lengths differ"),
    ],
)
def test_what_is_no_pair_says_why(tag, source, english, reason):
    assert clean_pair(tag, source, english) == reason


def test_more_placeholders_than_symbols_are_refused():
    text = " ".join(f"%({name})s word" for name in "abcdefghij")
    assert clean_pair("de", "wort " + text, text) == "placeholders differ"


@settings(max_examples=20)
@given(st.text(max_size=60), st.text(max_size=60))
def test_a_kept_pair_fits_a_tab_separated_line(source, english):
    cleaned = clean_pair("de", source, english)
    if not isinstance(cleaned, str):
        for text in cleaned:
            assert text == text.strip() != ""
            assert len(text.splitlines()) == 1
            assert "\t" not in text
