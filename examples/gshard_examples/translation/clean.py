"""From a catalogue entry to a sentence pair, or the reason why it is not one.

Catalogue messages carry mark-up that is no language: accelerators (`&File`,
`_File`, `(_F)`), HTML tags, and the placeholders of a dozen formatting systems.
Here the mark-up goes, and every placeholder becomes `{1}`, `{2}`, ... in the order
of the English side, the same number for the same placeholder on both sides.
"""

from __future__ import annotations

import html
import re
import unicodedata

from gshard_examples.translation.languages import written_in_own_script
from gshard_examples.translation.placeholders import number_placeholders

#: Longest accepted English and source text, in characters, after cleaning.
MAX_ENGLISH_CHARACTERS = 600
MAX_SOURCE_CHARACTERS = 800
#: Texts longer than this are refused before any regular expression sees them.
MAX_RAW_CHARACTERS = 4_000

_TAG = re.compile(r"</?[a-zA-Z][^<>]*>|<!--.*?-->", re.DOTALL)
_BRACKETED_ACCELERATOR = re.compile(r"\s*\([&_~][A-Za-z0-9]\)")
_AMPERSAND_ACCELERATOR = re.compile(r"&(?=[^\W\d_])")
_UNDERSCORE_ACCELERATOR = re.compile(r"_(?=\w)")
_LETTER = re.compile(r"[^\W\d_]")
_IDENTIFIER = re.compile(r"(?=.*(?:[_/]|\.\w))[\w.\-/]+")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\ufeff]")


def normalize_text(text: str, accelerator: str = "") -> str:
    """Removes mark-up and accelerators; NFC; single spaces.

    Args:
        text: One side of a catalogue entry.
        accelerator: The character that marks keyboard accelerators in this catalogue:
            `"_"`, `"&"`, `"~"`, or `""` when there is none.

    Returns:
        The text on one line, without control characters, in Unicode form NFC.
    """
    text = _BRACKETED_ACCELERATOR.sub("", text.replace("\\n", " "))
    if accelerator == "&":
        text = _AMPERSAND_ACCELERATOR.sub("", text)
    elif accelerator == "~":
        text = text.replace("~", "")
    elif accelerator == "_" and text.count("_") == 1:  # more are an identifier
        text = _UNDERSCORE_ACCELERATOR.sub("", text)
    if "<" in text:
        text = _TAG.sub(" ", text)
    if "&" in text:
        text = html.unescape(text)
    if not text.isascii():
        text = unicodedata.normalize("NFC", text)
    # White space first: a tab between two words must not glue them together.
    return _CONTROL.sub("", " ".join(text.split())).strip()


def clean_pair(
    tag: str, source: str, english: str, accelerator: str = ""
) -> tuple[str, str] | str:
    """Cleans one catalogue entry.

    Args:
        tag: The language tag of `source` (see `languages.normalize_language`).
        source: The translation.
        english: The English message.
        accelerator: See `normalize_text`.

    Returns:
        The cleaned `(source, english)`; or, for an entry that is not a usable pair,
        the reason as a short word that the corpus manifest counts.
    """
    if len(source) > MAX_RAW_CHARACTERS or len(english) > MAX_RAW_CHARACTERS:
        return "too long"
    source = normalize_text(source, accelerator)
    english = normalize_text(english, accelerator)
    if not source or len(english) < 2:
        return "empty"
    if len(english) > MAX_ENGLISH_CHARACTERS or len(source) > MAX_SOURCE_CHARACTERS:
        return "too long"
    numbered = number_placeholders(source, english)
    if numbered is None:
        return "placeholders differ"
    source, english = numbered
    letters = sum(character.isalpha() for character in english)
    if letters < max(2, 0.4 * len(english.replace(" ", ""))):
        return "few letters"
    if not english.isascii():
        ascii_letters = sum(c.isalpha() and c.isascii() for c in english)
        if ascii_letters < 0.95 * letters:
            return "english side is not english"
    if not re.search("[A-Za-z]{2}", english) or not _LETTER.search(source):
        return "few letters"
    if source.casefold() == english.casefold():
        return "untranslated"
    if not written_in_own_script(tag, source):
        return "other script"
    longer, shorter = len(english), len(source)
    if shorter > 12 and (longer > 6 * shorter or shorter > 5 * longer):
        return "lengths differ"
    if _IDENTIFIER.fullmatch(english):
        return "identifier"
    return source, english
