import errno
import json
import os
import signal
import subprocess
import sys
import textwrap
from collections import defaultdict
from importlib import metadata
from pathlib import Path

import pytest

from gshard_examples.translation import corpus as corpora
from gshard_examples.translation.corpus import CorpusError, load_corpus, prepare_corpus
from gshard_examples.translation.languages import base_language
from gshard_examples.translation.split import (
    PAIR_SPLITS,
    SPLITS,
    message_key,
    near_copies,
)

from .conftest import (
    catalogue,
    gettext_source,
    make_toy_corpus,
    messages,
    translate,
)

ROOT = Path(__file__).resolve().parents[2]


def contents(folder):
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


def hidden(folder):
    return [p.name for p in folder.iterdir() if p.name.startswith(".")]


def assert_no_leak(corpus):
    """No English message is on two sides, and `test` has no near-copy in `train`.

    New pairs have messages that train, in another language than theirs only.
    """
    pairs = {split: corpus.read(split) for split in SPLITS}
    keys = {
        split: {message_key(pair.english) for pair in pairs[split]} for split in SPLITS
    }
    new_messages = [split for split in SPLITS if split not in PAIR_SPLITS]
    for i, one in enumerate(new_messages):
        for other in new_messages[i + 1 :]:
            assert not keys[one] & keys[other], (one, other)
    trained = {(pair.lang, message_key(pair.english)) for pair in pairs["train"]}
    sources = {(pair.lang, pair.source.casefold()) for pair in pairs["train"]}
    languages = defaultdict(set)
    for tag, key in trained:
        languages[key].add(base_language(tag))
    held = [
        {(pair.lang, message_key(pair.english)) for pair in pairs[split]}
        for split in PAIR_SPLITS
    ]
    assert not held[0] & held[1] and not (held[0] | held[1]) & trained
    for split in PAIR_SPLITS:
        for pair in pairs[split]:
            assert (pair.lang, pair.source.casefold()) not in sources
            others = languages[message_key(pair.english)] - {base_language(pair.lang)}
            assert others, pair
    for split in ("dev", "test"):
        assert not near_copies(keys[split], keys["train"])
        assert (
            near_copies(keys[f"{split}_near"], keys["train"]) == keys[f"{split}_near"]
        )
    return keys


def test_toy_corpus(toy_corpus):
    keys = assert_no_leak(toy_corpus)
    assert all(keys[split] for split in ("train", "dev", "test", *PAIR_SPLITS))
    pairs = {split: toy_corpus.read(split) for split in SPLITS}
    # Every translation of every message is somewhere, and is what it was.
    expected = {
        (tag, translate(tag, m), m)
        for tag in ("de", "fr", "ru", "sr_Latn")
        for m in messages()
    }
    found = {
        (p.lang, p.source, p.english)
        for split in SPLITS
        for p in pairs[split]
        if not p.is_name
    }
    assert found == expected
    names = [p for split in SPLITS for p in pairs[split] if p.is_name]
    assert {p.domain for p in names} == {"pycountry"}
    for split in SPLITS:
        counts = toy_corpus.manifest["counts"][split]
        assert counts["pairs"] == len(pairs[split])
        assert counts["names"] == sum(p.is_name for p in pairs[split])
        assert counts["messages"] == len(keys[split])
        assert sum(counts["languages"].values()) == len(pairs[split])
        assert pairs[split] == sorted(pairs[split])
    assert list(toy_corpus.languages().values()) == sorted(
        toy_corpus.languages().values(), reverse=True
    )


def test_a_name_that_is_also_a_message_counts_as_a_message(tmp_path):
    entry = [("Big blue wide sea", "Großes blaues weites Meer")]
    files = {"a/de/LC_MESSAGES/a.mo": catalogue(entry)}
    sources = [gettext_source(files, "pycountry"), gettext_source(files, "toy")]
    made = prepare_corpus(tmp_path / "c", "toy", held_out=0, sources=sources)
    assert [pair.domain for pair in made.read("train")] == ["toy"]
    assert made.manifest["sources"]["pycountry"]["pairs"] == 0


def test_two_runs_give_the_same_bytes(toy_corpus, tmp_path):
    again = make_toy_corpus(tmp_path / "again")
    assert contents(again.path) == contents(toy_corpus.path)


def test_a_subset_has_the_same_held_out_messages(toy_corpus, tmp_path):
    subset = make_toy_corpus(tmp_path / "subset", languages=["de", "sr_Latn"])
    kept = {
        split: [p for p in toy_corpus.read(split) if p.lang in ("de", "sr_Latn")]
        for split in SPLITS
    }
    trained = {(p.lang, p.english) for p in kept["train"]}
    other = {"de": "sr_Latn", "sr_Latn": "de"}
    for split in PAIR_SPLITS:  # of messages that the subset trains
        kept[split] = [p for p in kept[split] if (other[p.lang], p.english) in trained]
        assert kept[split]
    for split in SPLITS:
        assert subset.read(split) == kept[split]
    alone = make_toy_corpus(tmp_path / "alone", languages=["de"])
    assert alone.read("test_pairs") == [] != alone.read("test")


def test_manifest(toy_corpus):
    manifest = json.loads((toy_corpus.path / "manifest.json").read_text())
    assert manifest["corpus"] == "toy"
    assert manifest["options"] == {"held_out": 0.6, "languages": None}
    assert manifest["sources"]["toy"]["version"] == "1.0"
    assert set(manifest["files"]) == {f"{split}.tsv" for split in SPLITS}
    assert str(toy_corpus.path.parent) not in json.dumps(manifest)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"languages": ["xq1"]}, "xq1"),
        ({"languages": ["pt_BR"]}, "write 'pt'"),
        ({"languages": "de"}, "list of language tags"),
        ({"languages": []}, "must not be empty"),
        ({"languages": ["ja"]}, "no training pair"),
        ({"held_out": 0.9}, "held_out=0.9"),
        ({"sources": [gettext_source({})]}, "no usable sentence pair in toy"),
        ({"sources": None, "corpus": "Q"}, "corpus='Q'"),
    ],
)
def test_bad_options(tmp_path, options, match):
    with pytest.raises(ValueError, match=match):
        make_toy_corpus(tmp_path / "out", **options)
    assert list(tmp_path.iterdir()) == []


def test_bad_input_is_skipped_and_counted(tmp_path):
    good = [(m, translate("de", m)) for m in messages(20)]
    made = make_toy_corpus(
        tmp_path / "out",
        held_out=0,
        sources=[
            gettext_source(
                {
                    "t/de/LC_MESSAGES/good.mo": catalogue(
                        [*good, ("Long line", "x" * 50_000), ("Same here", "same HERE")]
                    ),
                    "t/de/LC_MESSAGES/empty.mo": b"",
                    "t/fr/LC_MESSAGES/latin1.mo": catalogue(
                        [("Open the door", "Ouvrir")]
                    ).replace(b"Ouvrir", b"\xe9\xe8\xff\xfe\xfd!"),
                    "t/qqq/LC_MESSAGES/doc.mo": catalogue([("Open it", "about this")]),
                }
            )
        ],
    )
    report = made.manifest["sources"]["toy"]
    assert report["skipped"] == {
        "too long": 1,
        "untranslated": 1,
        "files: empty": 1,
        "files: not UTF-8": 1,
        "not a language of the corpus": 1,
    }
    assert report["pairs"] == len(good) == made.manifest["totals"]["pairs"]


# ------------------------------------------------------------------ damaged folders


def test_damaged_corpora_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="prepare one first"):
        load_corpus(tmp_path / "nothing")
    out = tmp_path / "out"
    make_toy_corpus(out)
    train, manifest = out / "train.tsv", out / "manifest.json"
    whole, said = train.read_bytes(), manifest.read_bytes()

    train.write_bytes(whole[:-10])
    with pytest.raises(CorpusError, match="bytes. Received"):
        load_corpus(out)
    train.write_bytes(whole[:-2] + b"!\n")
    with pytest.raises(CorpusError, match="altered"):
        load_corpus(out)
    train.unlink()
    with pytest.raises(CorpusError, match="lacks train.tsv"):
        load_corpus(out)
    train.write_bytes(whole)

    manifest.write_bytes(said[: len(said) // 2])
    with pytest.raises(CorpusError, match="damaged"):
        load_corpus(out)
    # Format 1 had no pairs held out.
    for earlier in (b"1", b"99"):
        manifest.write_bytes(said.replace(b'"format": 2', b'"format": ' + earlier))
        message = f"format {earlier.decode()}; .* prepare --replace --data .*{out.name}"
        with pytest.raises(CorpusError, match=message):
            load_corpus(out)
    manifest.unlink()
    with pytest.raises(CorpusError, match="half-written"):
        load_corpus(out)
    manifest.write_bytes(said)
    assert load_corpus(out).read("train")
    with pytest.raises(ValueError, match="split='tets'"):
        load_corpus(out).read("tets")


# ------------------------------------------------------------- dying at any moment


def run_and_kill(out, activity, done, signal_name="SIGKILL"):
    script = textwrap.dedent(
        """
        import importlib.util, os, signal, sys
        sys.path.insert(0, {root!r})
        spec = importlib.util.spec_from_file_location("toy", {conftest!r})
        toy = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(toy)
        # A shell's background jobs ignore Ctrl-C, and pass that on.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        def progress(activity, done, total):
            if (activity, done) == ({activity!r}, {done!r}):
                os.kill(os.getpid(), signal.{signal_name})
        toy.make_toy_corpus({out!r}, replace=True, progress=progress)
        """
    ).format(
        root=str(ROOT),
        conftest=str(Path(__file__).with_name("conftest.py")),
        activity=activity,
        done=done,
        signal_name=signal_name,
        out=str(out),
    )
    return subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize(
    ("activity", "done"), [("splitting", 0), ("writing", 3), ("writing", len(SPLITS))]
)
def test_kill_9_leaves_nothing_or_the_old_corpus(toy_corpus, tmp_path, activity, done):
    out = tmp_path / "out"
    killed = run_and_kill(out, activity, done)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not out.exists()
    assert hidden(tmp_path) == [".out.partial"]
    with pytest.raises(FileNotFoundError):
        load_corpus(out)

    # The next run clears up and makes the corpus.
    make_toy_corpus(out)
    assert contents(out) == contents(toy_corpus.path)
    assert hidden(tmp_path) == []

    # Killed while replacing a corpus: that one is still there, whole.
    assert run_and_kill(out, activity, done).returncode == -signal.SIGKILL
    assert load_corpus(out).manifest == toy_corpus.manifest


def test_ctrl_c(tmp_path):
    stopped = run_and_kill(tmp_path / "out", "writing", 2, "SIGINT")
    assert "KeyboardInterrupt" in stopped.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_full_disk(tmp_path, monkeypatch):
    really_write = corpora.write_synced

    def write(path, data):
        # /dev/full answers every write as a full disk does.
        really_write(Path("/dev/full") if path.name == "test.tsv" else path, data)

    monkeypatch.setattr(corpora, "write_synced", write)
    with pytest.raises(OSError, match="nothing was published") as caught:
        make_toy_corpus(tmp_path / "out")
    assert caught.value.errno == errno.ENOSPC
    assert list(tmp_path.iterdir()) == []


def test_file_size_limit(tmp_path):
    """The operating system itself refuses, in the middle of a file."""
    script = (
        "import resource, signal, sys, runpy\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        f"toy = runpy.run_path({str(Path(__file__).with_name('conftest.py'))!r})\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))\n"
        f"toy['make_toy_corpus']({str(tmp_path / 'out')!r})\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert f"[Errno {errno.EFBIG}]" in done.stderr
    assert "nothing was published" in done.stderr
    assert os.listdir(tmp_path) == []


# ------------------------------------------------------------------- the real thing

S_PACKAGES = ("django", "plone.app.locales", "gramps", "pycountry")


def installed(*packages):
    names = {d.metadata["Name"].lower() for d in metadata.distributions()}
    return all(package in names for package in packages)


@pytest.mark.slow
@pytest.mark.skipif(not installed(*S_PACKAGES), reason="needs corpus S's packages")
def test_corpus_s(tmp_path):
    made = prepare_corpus(tmp_path / "S", "S")
    totals = made.manifest["totals"]
    assert totals["pairs"] == pytest.approx(582_573, rel=0.02)
    assert totals["english_messages"] == pytest.approx(22_841, rel=0.02)
    assert totals["languages_with"]["200"] == pytest.approx(111, abs=2)
    assert made.manifest["counts"]["test"]["pairs"] == pytest.approx(10_862, rel=0.1)
    new_pairs = made.languages("test_pairs")
    assert sum(new_pairs.values()) == pytest.approx(3_374, rel=0.1)
    assert len(new_pairs) == pytest.approx(102, abs=3)
    assert sum(count >= 20 for count in new_pairs.values()) > 70
    assert_no_leak(made)
    languages = {base_language(p.lang) for p in made.read("test")}
    assert len(languages) > 100


@pytest.mark.skipif(not installed("django"), reason="needs django")
def test_part_of_corpus_s_is_reproducible(tmp_path):
    from gshard_examples.translation.catalogues import read_gettext
    from gshard_examples.translation.package_files import installed_files
    from gshard_examples.translation.sources import Source

    def wanted(path):
        return path.startswith("django/conf/locale/") and path.endswith(".mo")

    def read(skipped):
        return read_gettext(installed_files("django", wanted), skipped)

    django = Source("django", metadata.version("django"), "BSD-3-Clause", "", read)
    runs = [
        prepare_corpus(tmp_path / name, "django", held_out=0.2, sources=[django])
        for name in "ab"
    ]
    assert contents(runs[0].path) == contents(runs[1].path)
    assert len(runs[0].languages()) > 60
    assert_no_leak(runs[0])
