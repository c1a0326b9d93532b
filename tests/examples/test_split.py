import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gshard_examples.translation.split import (
    assign_splits,
    message_key,
    near_copies,
)

from .conftest import messages


def test_message_key_keeps_only_the_words():
    keys = {message_key(t) for t in ("{1} files.", "FILES", "Files: {2}", "12 files")}
    assert keys == {"files"}
    assert message_key("Réunion") == "reunion"


words = st.lists(st.sampled_from("a b c d e f g".split()), min_size=1, max_size=6)
keys = st.lists(words.map(" ".join), max_size=12)


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
