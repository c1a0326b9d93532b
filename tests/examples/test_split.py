import itertools
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gshard_examples.translation.split import (
    assign_splits,
    choose_new_pairs,
    message_key,
    near_copies,
    source_key,
)

from .conftest import messages


def test_message_key_keeps_only_the_words():
    keys = {message_key(t) for t in ("{1} files.", "FILES", "Files: {2}", "12 files")}
    assert keys == {"files"}
    assert message_key("Réunion") == "reunion"


words = st.lists(st.sampled_from("a b c d e f g".split()), min_size=1, max_size=6)
keys = st.lists(words.map(" ".join), max_size=12)


@settings(max_examples=20)
@given(keys, keys, st.sampled_from([0.3, 0.5, 0.6, 0.8, 1.0]))
def test_near_copies_are_exact(held, training, threshold):
    def jaccard(a, b):
        a, b = set(a.split()), set(b.split())
        return len(a & b) / len(a | b)

    expected = {
        h
        for h, t in itertools.product(held, training)
        if jaccard(h, t) >= threshold - 1e-9
    }
    assert near_copies(held, training, threshold) == expected


def test_shares_and_short_messages():
    wide = {message_key(m): set(map(str, range(40))) for m in messages(2000)}
    narrow = {f"{key} zzz": {"de"} for key in wide}
    short = {f"word{chr(97 + i)}": {"de"} for i in range(26)}
    splits = assign_splits(wide | narrow | short, held_out=0.3)

    def share(part, of):
        return sum(splits[key].startswith(part) for key in of) / len(of)

    assert share("test", wide) == pytest.approx(0.3, abs=0.04)
    assert share("dev", wide) == pytest.approx(0.15, abs=0.04)
    assert share("test", narrow) == pytest.approx(0.05, abs=0.02)
    assert share("train", short) == 1.0


@pytest.mark.parametrize("held_out", [-0.1, 0.7, float("nan")])
def test_share_must_leave_something(held_out):
    with pytest.raises(ValueError, match="Received: held_out="):
        assign_splits({}, held_out)


# ------------------------------------------------------------------------- new pairs


def trained(languages, count=300):
    return [
        (tag, f"{tag} {message}", message_key(message))
        for message in messages(count)
        for tag in languages
    ]


def test_sizes_of_the_new_pairs():
    split_of = choose_new_pairs(trained(["de", "fr"]) + trained(["ru"], 120))
    sizes = Counter((tag, split) for (tag, _), split in split_of.items())
    # A tenth of the messages that can be held out, at most 40; half of it for dev.
    assert {tag: sizes[tag, "test_pairs"] for tag in ("de", "fr", "ru")} == {
        "de": pytest.approx(30, abs=2),
        "fr": pytest.approx(28, abs=4),  # not those that de holds out
        "ru": pytest.approx(11, abs=2),
    }
    for tag in ("de", "fr", "ru"):
        assert sizes[tag, "dev_pairs"] == sizes[tag, "test_pairs"] // 2
    many = choose_new_pairs(trained(["de", "fr", "ru"], 1000))
    sizes = Counter((tag, split) for (tag, _), split in many.items())
    assert set(sizes.values()) == {40, 20}
    assert choose_new_pairs(trained(["de", "fr"], 90)) == {}
    assert choose_new_pairs(trained(["de"])) == {}
    # The same language in another script does not know a message for the first.
    assert choose_new_pairs(trained(["sr", "sr_Latn"])) == {}


def test_new_pairs_do_not_depend_on_the_order():
    pairs = trained(["de", "fr", "ru"])
    assert choose_new_pairs(pairs[::-1]) == choose_new_pairs(pairs)


def test_a_source_with_two_meanings_is_not_held_out():
    pairs = trained(["de", "fr"])
    # All of de's sources are the same words; fr's differ.
    same = [(t, "Der, die - das!" if t == "de" else s, k) for t, s, k in pairs]
    assert {tag for tag, _ in choose_new_pairs(same)} == {"fr"}
    assert source_key("Der, die - das {1}!") == "der die das"


rows = st.tuples(
    st.sampled_from(["de", "fr", "sr", "sr_Latn"]),
    st.sampled_from([f"s{letter}" for letter in "abcdefgh"]),
    st.sampled_from([f"{letter} x y" for letter in "abcdef"]),
)


@settings(max_examples=20)
@given(st.lists(rows, max_size=40))
def test_new_pairs_are_known_elsewhere_and_nowhere_here(training):
    split_of = choose_new_pairs(training, most=2, least=1)
    left = [row for row in training if (row[0], row[2]) not in split_of]
    for tag, key in split_of:
        base = tag.partition("_")[0]
        assert any(k == key and t.partition("_")[0] != base for t, _, k in left)
        sources = {s for t, s, k in training if (t, k) == (tag, key)}
        assert not any(t == tag and s in sources for t, s, _ in left)
