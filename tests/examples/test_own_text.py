"""Somebody's own text: from files to a translator, and what is wrong with a line."""

import logging
import re
import subprocess
import sys

import numpy as np
import pytest
import tensorflow as tf

import gshard_examples.translation as gshard_translate
from gshard_examples.translation import cli
from gshard_examples.translation.corpus import load_corpus, prepare_corpus
from gshard_examples.translation.lengths import check_lengths
from gshard_examples.translation.own_split import assign_own_splits
from gshard_examples.translation.own_text import (
    language_tag,
    moses_files,
    prepare_own_text,
    tsv_files,
)
from gshard_examples.translation.split import message_key, near_copies
from gshard_examples.translation.tokens import tokenize_split
from gshard_examples.translation.vocabulary import Vocabulary, train_vocabulary

from .conftest import messages, translate


def rows(tags=("de", "ru"), count=200):
    return [(tag, translate(tag, m), m) for m in messages(count) for tag in tags]


def write_tsv(path, examples, end="\n"):
    text = "".join("\t".join(example) + end for example in examples)
    path.write_bytes(text.encode())
    return path


def triples(corpus, *splits):
    return sorted((p.lang, p.source, p.english) for s in splits for p in corpus.read(s))


ALL = ("train", "dev", "test", "dev_near", "test_near", "dev_pairs", "test_pairs")


# ------------------------------------------------------------- one text, many ways in


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("own")
    return prepare_own_text(folder / "own", tsv_files(write_tsv(folder / "a", rows())))


def test_nothing_is_lost_and_the_split_is_useful(corpus):
    assert triples(corpus, *ALL) == sorted(set(rows()))
    found = {split: corpus.read(split) for split in ALL}
    assert len(found["test"]) >= 20 and len(found["dev"]) >= 10
    assert len(found["test_pairs"]) >= 20 and len(found["dev_pairs"]) >= 10
    keys = {s: {message_key(p.english) for p in found[s]} for s in ALL}
    assert not keys["train"] & (keys["test"] | keys["dev"]) and not (
        keys["test"] & keys["dev"]
    )
    assert not near_copies(keys["test"] | keys["dev"], keys["train"])
    assert {p.domain for p in found["train"]} == {"own"}


def everything(corpus):
    return {split: corpus.read(split) for split in ALL}


def test_files_and_python_give_the_same_corpus(corpus, tmp_path):
    wanted = everything(corpus)
    crlf = write_tsv(tmp_path / "b.tsv", rows(), "\r\n")
    crlf.write_bytes(b"\xef\xbb\xbf" + crlf.read_bytes())
    moses = []
    for tag in ("de", "ru"):
        own = [example for example in rows() if example[0] == tag]
        paths = tmp_path / f"c.{tag}", tmp_path / f"c.{tag}.en"
        paths[0].write_text("\n".join(s for _, s, _ in own), "utf-8")
        paths[1].write_text("\n".join(e for _, _, e in own) + "\n", "utf-8")
        moses.append(moses_files(tag, *paths))
    dataset = tf.data.Dataset.from_tensor_slices(
        tuple(list(column) for column in zip(*rows(), strict=True))
    )
    half = len(rows()) // 2
    parts = [
        tsv_files(write_tsv(tmp_path / f"d{i}", part))
        for i, part in enumerate((rows()[:half], rows()[half:]))
    ]
    for number, text in enumerate(
        (
            tsv_files(crlf),
            moses[0] + moses[1],
            iter(rows()),
            [(tag, s.encode(), e.encode()) for tag, s, e in rows()],
            dataset,
            parts[1] + parts[0],
        )
    ):
        assert everything(prepare_own_text(tmp_path / f"{number}", text)) == wanted


def test_the_manifest_names_the_files(tmp_path):
    (tmp_path / "other").mkdir()
    one = write_tsv(tmp_path / "a.tsv", rows(("de",)))
    two = write_tsv(tmp_path / "other" / "a.tsv", rows(("ru",)))
    made = prepare_own_text(tmp_path / "out", tsv_files(one, two))
    assert set(made.manifest["sources"]["own"]["inputs"]) == {"a.tsv", "a.tsv (2)"}
    assert str(tmp_path) not in (made.path / "manifest.json").read_text()


# -------------------------------------------------------------------- broken lines

GOOD = b"de\tGuten Tag\tGood day\n"
BROKEN = {
    "two columns": (b"de\tgut\n", "3 columns.*Received: 2"),
    "four columns": (b"de\tgut\tgood\tbetter\n", "3 columns.*Received: 4"),
    "an empty line": (b"\n", "3 columns.*Received: 1"),
    "no source": (b"de\t \tgood\n", "the source must not be empty. Received: ' '"),
    "no English": (b"de\tgut\t\n", "the English must not be empty"),
    "Latin-1": (b"de\tsch\xf6n\tnice\n", r"UTF-8.*b'\\xf6n' in the source at byte 3"),
    "NUL": (b"de\tgut\tgo\0od\n", r"U\+0000 in the English at character 2"),
    "escape": (b"de\tgu\x1bt\tgood\n", r"U\+001B in the source at character 2"),
    "a name": (b"german\tgut\tgood\n", "that of German is de.*Received: 'german'"),
    "English": (b"en\tgood\tgood\n", "another language than English.*'en'"),
    "no language": (b"xx\tgut\tgood\n", "ISO 639 has none.*Received: 'xx'"),
    "an odd tag": (b"d\tgut\tgood\n", "de, pt_BR or sr_Latn.*Received: 'd'"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_line_is_named(tmp_path, name):
    line, match = BROKEN[name]
    path = tmp_path / "mine.tsv"
    path.write_bytes(GOOD + GOOD + line + GOOD)
    with pytest.raises(ValueError, match=rf"mine\.tsv, line 3: .*{match}"):
        prepare_own_text(tmp_path / "out", tsv_files(path))
    assert not (tmp_path / "out").exists()


def test_broken_lines_can_be_skipped_and_are_counted(tmp_path, caplog):
    path = write_tsv(tmp_path / "mine.tsv", rows())
    broken = b"".join(line for line, _ in BROKEN.values())
    path.write_bytes(path.read_bytes() + broken)
    with caplog.at_level(logging.INFO):
        made = prepare_own_text(tmp_path / "out", tsv_files(path), skip_broken=True)
    assert triples(made, *ALL) == sorted(set(rows()))
    skipped = made.manifest["sources"]["own"]["skipped"]
    assert skipped == {
        "lines: wrong number of columns": 3,
        "lines: empty source": 1,
        "lines: empty English": 1,
        "lines: not UTF-8": 1,
        "lines: control character": 2,
        "lines: unknown language": 4,
    }
    [record] = [r for r in caplog.records if "left out" in r.getMessage()]
    assert "12 of 412 lines" in record.getMessage()
    assert record.levelno == logging.INFO


def test_moses_files_must_be_of_one_length(tmp_path):
    (tmp_path / "a.de").write_text("eins\nzwei\ndrei\n")
    (tmp_path / "a.en").write_text("one\ntwo\n")
    with pytest.raises(ValueError, match=r"a\.de with 3 lines, .*a\.en with 2"):
        moses_files("de", tmp_path / "a.de", tmp_path / "a.en")
    (tmp_path / "a.en").write_text("one\n\nthree\n")
    text = moses_files("de", tmp_path / "a.de", tmp_path / "a.en")
    with pytest.raises(ValueError, match=r"a\.de, line 2 \(.*a\.en, line 2\): the E"):
        prepare_own_text(tmp_path / "out", text)
    (tmp_path / "a.en").write_text("")
    with pytest.raises(ValueError, match="a.en with 0"):
        moses_files("de", tmp_path / "a.de", tmp_path / "a.en")
    with pytest.raises(ValueError, match="that of German is de"):
        moses_files("German", tmp_path / "a.de", tmp_path / "a.en")


def test_texts_of_no_use(tmp_path):
    (tmp_path / "empty").write_bytes(b"")
    with pytest.raises(ValueError, match="empty is empty"):
        prepare_own_text(tmp_path / "out", tsv_files(tmp_path / "empty"))
    with pytest.raises(FileNotFoundError, match="nothing"):
        tsv_files(tmp_path / "nothing")
    for wrong in ([("de", "gut", 3)], ["de"], [{"language": "de"}]):
        with pytest.raises(TypeError, match="pair 0: .*Received"):
            prepare_own_text(tmp_path / "out", wrong)
    batched = tf.data.Dataset.from_tensors((["de"], ["gut"], ["good"]))
    with pytest.raises(TypeError, match="pair 0"):
        prepare_own_text(tmp_path / "out", batched)
    same = [("de", "The same text", "the same text")] * 3
    with pytest.raises(ValueError, match=r"pair in own \(untranslated: 3\)"):
        prepare_own_text(tmp_path / "out", same)
    with pytest.raises(ValueError, match="enough English messages.*1 messages"):
        prepare_own_text(tmp_path / "out", [("de", "Guten Tag", "Good day to you")])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty"]


def test_much_that_cleaning_leaves_out_is_a_warning(tmp_path, caplog):
    untranslated = [("de", m, m) for m in messages(40)]
    prepare_own_text(tmp_path / "out", rows() + untranslated)
    [record] = [r for r in caplog.records if "left out" in r.getMessage()]
    assert "40 of 440 lines are left out (untranslated: 40)" in record.getMessage()
    assert record.levelno == logging.WARNING


def test_language_tags():
    given = "de de_AT pt-BR sr@latin zh-TW iw sr_Latn qaa jp tpi"
    wanted = "de de pt sr_Latn zh_Hant he sr_Latn qaa ja tpi"
    assert [language_tag(tag) for tag in given.split()] == wanted.split()


# ------------------------------------------------------------------------ held out


def test_given_dev_and_test_are_used_and_do_not_train(tmp_path):
    text = rows()
    # Two messages of the text, and one that it does not have.
    test = [("fr", "Pomme et panier", m) for m in messages(2)]
    test.append(("de", "Etwas ganz anderes", "Something else altogether"))
    dev = [("de", "Noch etwas Neues hier", "Another thing that is new"), test[0]]
    made = prepare_own_text(tmp_path / "both", text, dev, test)
    assert triples(made, "test") == sorted(test)
    assert triples(made, "dev") == dev[:1]  # the other's message is in the test
    gone = set(messages(2))
    kept = sorted(set(row for row in text if row[2] not in gone))
    assert triples(made, "train", "dev_pairs", "test_pairs") == kept
    assert made.manifest["options"]["removed"] == 4
    one = prepare_own_text(tmp_path / "one", text, test=test)
    assert triples(one, "test") == sorted(test) and one.read("test_near") == []
    assert len(one.read("dev")) >= 10
    assert triples(one, "train", "dev", "dev_near", "dev_pairs", "test_pairs") == kept


def test_small_texts_have_a_test_of_a_useful_size():
    for count in (60, 300, 3_000):
        keys = {message_key(m): {"de"} for m in messages(count)}
        sizes = split_sizes(keys)
        assert sizes["test"] >= min(50, count // 20), (count, sizes)
        assert sizes["dev"] >= min(25, count // 40), (count, sizes)
        assert sizes["train"] >= 0.6 * len(keys)


def split_sizes(keys, **options):
    split_of, _ = assign_own_splits(keys, **options)
    return {split: list(split_of.values()).count(split) for split in ALL}


def test_messages_that_are_much_alike(caplog):
    """A toy grammar: nearly every message is a near-copy of another."""
    nouns = "cat dog cow pig hen fox".split()
    verbs = "sees likes hears finds".split()
    keys = {
        f"the {a} {v} the {b} in the garden": {"de"}
        for a in nouns
        for v in verbs
        for b in nouns
    }
    split_of, decided = assign_own_splits(keys)
    assert decided["near_copy"] is None and "so alike" in caplog.text
    sizes = [list(split_of.values()).count(split) for split in ("dev", "test")]
    assert min(sizes) >= 3
    # A list of words is tested on words.
    words = {f"word{chr(97 + i)}{chr(97 + j)}" for i in range(12) for j in range(26)}
    split_of, decided = assign_own_splits({word: {"de"} for word in words})
    assert decided["min_words"] == 1 and "test" in split_of.values()


def test_large_texts_are_not_held_out_by_the_share():
    keys = {f"{i}a {i}b {i}c": {"de"} for i in range(24_000)}  # none like another
    sizes = split_sizes(keys)
    assert sizes["test"] == pytest.approx(1_000, rel=0.15)
    assert sizes["dev"] == pytest.approx(500, rel=0.15)
    assert split_sizes(keys, held_out=0.2)["test"] == pytest.approx(4_800, rel=0.1)


# ------------------------------------------------------------------------- too long


def test_pairs_that_are_too_long_are_said(corpus, tmp_path, caplog):
    path = train_vocabulary(corpus, tmp_path / "v.model", 400, character_coverage=1.0)
    tokens = tokenize_split(corpus, "train", Vocabulary(path))
    source, target = tokens.source_lengths, tokens.target_lengths

    def left_out(most):
        return sum(s > most or t > most for s, t in zip(source, target, strict=True))

    longest = max(source.max(), target.max())
    assert check_lengths(tokens, (longest, longest), "--row-lengths") == (
        0,
        len(tokens),
    )
    assert not caplog.records
    some = next(n for n in range(longest, 0, -1) if left_out(n) > 0.1 * len(tokens))
    check_lengths(tokens, (some, some), "--row-lengths")
    said = caplog.records[-1].getMessage()
    assert f"{left_out(some):,} of {len(tokens):,} training pairs" in said
    numbers = re.search(r"sources have at most (\d+) ids, of the targets (\d+)", said)
    for most, lengths in zip(map(int, numbers.groups()), (source, target), strict=True):
        assert np.mean(lengths <= most) >= 0.99 > np.mean(lengths < most)
    with pytest.raises(ValueError, match=f"--row-lengths must.*{left_out(5)} of"):
        check_lengths(tokens, (5, 5), "--row-lengths")


# --------------------------------------------------------------------- end to end

TINY = (
    "--vocab-size 420 --character-coverage 1 --batch-tokens 384 --partitions 0 "
    "--encoder-layers 1 --decoder-layers 1 --model-dim 32 --hidden-dim 48 --heads 2 "
    "--experts 0 --warmup 10 --validation-pairs 32 --learning-rate 0.005"
).split()


def command(*words):
    return cli.main([str(word) for word in words])


def test_from_a_file_to_a_translator(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_tsv(tmp_path / "mine.tsv", rows())
    own = ["--tsv", "mine.tsv", "--data", "data/mine"]
    where = ["--run", "runs/mine", "--data", "data/mine"]
    assert command("prepare", *own, *TINY) == 0
    held = re.search(r"Held out: (.*)", capsys.readouterr().out)[1]
    assert re.search(r"test \d\d.*test_pairs \d\d", held)
    made = load_corpus("data/mine").manifest
    # Too short a row is an error, after which another length may be chosen.
    steps = ["--steps", 60, "--steps-per-epoch", 30, *TINY]
    assert command("train", *where, *steps, "--row-lengths", "6,6") == 2
    assert "sources have at most" in capsys.readouterr().err
    everything = ["run", *own, "--run", "runs/mine", *steps, "--row-lengths", "32,32"]
    assert command(*everything, "--per-language", 5, "--beam-size", 1) == 0
    printed = capsys.readouterr().out
    for name in ("test", "test_pairs"):
        assert f"{name}: 10 pairs" in printed
    assert load_corpus("data/mine").manifest == made  # the same text, not made again
    sources = [row[1] for row in rows() if row[0] == "de"][:3]
    said = [
        gshard_translate.load(folder, **options)(sources, "de")
        for folder, options in (
            ("runs/mine", {"beam_size": 1}),
            ("runs/mine/saved_model", {}),
        )
    ]
    assert said[0] == said[1] and any(said[0])
    # Other text in the same folder is refused, until it is to be replaced.
    write_tsv(tmp_path / "mine.tsv", rows(("de", "fr")))
    assert command("prepare", *own, *TINY) == 2
    assert "the named files as they are now" in capsys.readouterr().err
    assert load_corpus("data/mine").manifest == made
    assert command("prepare", *own, *TINY, "--replace") == 0
    assert set(load_corpus("data/mine").languages()) == {"de", "fr"}


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (["--tsv", "a.tsv"], "--data must name a folder.*corpus S"),
        (["--tsv", "none.tsv", "--data", "d"], "none.tsv"),
        (
            ["--dev-tsv", "a.tsv", "--held-out", "0.1"],
            "Received: --dev-tsv, --held-out",
        ),
        (["--tsv", "a.tsv", "--data", "d", "--held-out", "0.9"], "held_out=0.9"),
        (["--moses", "de=a", "--data", "d"], "TAG=SOURCE,ENGLISH.*'de=a'"),
        (["--moses", "german=a,b", "--data", "d"], "that of German is de"),
    ],
)
def test_mistakes_get_a_sentence(tmp_path, monkeypatch, capsys, options, match):
    monkeypatch.chdir(tmp_path)
    write_tsv(tmp_path / "a.tsv", rows())
    try:
        assert command("prepare", *options) == 2
    except SystemExit as stopped:
        assert stopped.code == 2  # argparse
    assert re.search(match, capsys.readouterr().err)
    assert [path.name for path in tmp_path.iterdir()] == ["a.tsv"]


def test_another_corpus_in_the_folder_is_refused(toy_corpus, tmp_path, capsys):
    path = write_tsv(tmp_path / "a.tsv", rows())
    assert command("prepare", "--tsv", path, "--data", toy_corpus.path) == 2
    assert "Received: corpus 'toy'" in capsys.readouterr().err


def test_only_own_text_has_its_rules(tmp_path):
    with pytest.raises(ValueError, match="corpus='own'"):
        prepare_corpus(tmp_path / "out", "own")


def test_preparing_loads_no_tensorflow(tmp_path):
    code = (
        "import sys; from gshard_examples.translation import own_text as own; "
        "own.prepare_own_text(sys.argv[2], own.tsv_files(sys.argv[1])); "
        "sys.exit('tensorflow' in sys.modules)"
    )
    path = write_tsv(tmp_path / "a.tsv", rows())
    subprocess.run([sys.executable, "-c", code, path, tmp_path / "out"], check=True)
