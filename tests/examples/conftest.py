"""A toy corpus, made up here: no text of any real catalogue."""

import random
from collections import Counter

import polib
import pytest

from gshard_examples.translation.catalogues import read_gettext
from gshard_examples.translation.corpus import prepare_corpus
from gshard_examples.translation.sources import Source

WORDS = (
    "apple basket candle desert engine feather garden hammer island jacket kettle "
    "ladder meadow needle orange pocket quarry ribbon saddle timber umbrella valley "
    "walnut yellow zipper bridge copper dinner forest glacier harbor inkwell jungle "
    "kitten lantern mirror nickel orchard pepper quiver rocket silver tunnel uncle"
).split()
CYRILLIC = str.maketrans("abcdefghijklmnopqrstuvwxyz", "абцдефгхийклмнопярстуввхуз")


def messages(count=240, seed=0):
    """English messages of three to seven words; the numbers of words differ."""
    draw = random.Random(seed)  # noqa: S311 - not for secrets
    made = []
    for _ in range(count):
        words = draw.sample(WORDS, draw.randint(3, 7))
        made.append(" ".join(words).capitalize())
    return list(dict.fromkeys(made))


def translate(tag, english):
    """A made-up 'translation' that can be learned: endings or another alphabet."""
    if tag == "ru":
        return english.lower().translate(CYRILLIC)
    ending = {"de": "en", "fr": "é", "sr_Latn": "ić"}.get(tag, "o")
    return " ".join(word + ending for word in english.split())


def catalogue(entries, compiled=True):
    """Builds the bytes of a .mo (or .po) file.

    Args:
        entries: (message, translation), or (message, plural, [translations]).
        compiled: .mo or .po.
    """
    po = polib.POFile()
    po.metadata = {"Content-Type": "text/plain; charset=UTF-8"}
    for entry in entries:
        if len(entry) == 2:
            po.append(polib.POEntry(msgid=entry[0], msgstr=entry[1]))
        else:
            po.append(
                polib.POEntry(
                    msgid=entry[0],
                    msgid_plural=entry[1],
                    msgstr_plural=dict(enumerate(entry[2])),
                )
            )
    return po.to_binary() if compiled else str(po).encode()


def gettext_source(files, domain="toy"):
    """A source that reads gettext files given as {path: bytes}."""
    return Source(
        domain,
        "1.0",
        "none",
        "",
        lambda skipped: read_gettext(sorted(files.items()), skipped),
    )


def toy_sources(languages=("de", "fr", "ru", "sr@latin"), count=240):
    tags = {"sr@latin": "sr_Latn"}
    files = {
        f"toy/{locale}/LC_MESSAGES/toy.mo": catalogue(
            (m, translate(tags.get(locale, locale), m)) for m in messages(count)
        )
        for locale in languages
    }
    names = {
        "names/de/LC_MESSAGES/iso.mo": catalogue(
            (f"Republic of {w.capitalize()}", f"Republik {w.capitalize()}")
            for w in WORDS
        )
    }
    return [gettext_source(names, "pycountry"), gettext_source(files)]


def make_toy_corpus(out_dir, **options):
    options = {"held_out": 0.6, "sources": toy_sources(), "corpus": "toy"} | options
    return prepare_corpus(out_dir, **options)


@pytest.fixture(scope="session")
def toy_corpus(tmp_path_factory):
    return make_toy_corpus(tmp_path_factory.mktemp("corpora") / "toy")


@pytest.fixture(scope="session")
def toy_model(toy_corpus, tmp_path_factory):
    """The file of a small vocabulary."""
    from gshard_examples.translation.vocabulary_training import train_vocabulary

    path = tmp_path_factory.mktemp("vocabulary") / "toy.model"
    return train_vocabulary(toy_corpus, path, size=600, character_coverage=1.0)


@pytest.fixture(scope="session")
def toy_vocabulary(toy_model):
    from gshard_examples.translation.vocabulary import Vocabulary

    return Vocabulary(toy_model)


@pytest.fixture
def skipped():
    return Counter()
