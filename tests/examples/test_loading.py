"""A translator in three lines, from a run and from a SavedModel."""

import subprocess
import sys

import pytest
import tensorflow as tf

import gshard_examples.translation as gshard_translate
from gshard_examples.translation import export
from gshard_examples.translation.model import make_model
from gshard_examples.translation.settings import Settings
from gshard_examples.translation.translator import Translator
from gshard_tf import CheckpointManager, training_state

TEXTS = ["gardenen hammeren", "", "appleo basketo candleo", "мир"]
TAGS = ["de", "de", "fr", "ru"]


@pytest.fixture(scope="module")
def run(toy_vocabulary, tmp_path_factory):
    """An untrained run, as `train` leaves one."""
    folder = tmp_path_factory.mktemp("runs") / "toy"
    folder.mkdir()
    settings = Settings(
        encoder_layers=1,
        decoder_layers=2,
        model_dim=32,
        hidden_dim=48,
        heads=2,
        experts=4,
        partitions=0,
        seed=7,
    )
    settings.write(folder)
    (folder / "vocab.model").write_bytes(toy_vocabulary.model_bytes)
    model = make_model(settings, toy_vocabulary)
    checkpoints = CheckpointManager(folder / "checkpoints")
    checkpoints.save(training_state(model), 1)
    checkpoints.close()
    return folder, model


@pytest.fixture(scope="module")
def saved(run, toy_vocabulary, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exports") / "saved_model"
    return export.export(Translator(run[1], toy_vocabulary), folder)


def by_signature(saved, texts, tags):
    """One text at a time, so without the rest of the batch."""
    loaded = tf.saved_model.load(str(saved))
    return [
        loaded.signatures["translate"](
            texts=tf.constant([text]), languages=tf.constant([tag])
        )["translations"][0]
        .numpy()
        .decode()
        for text, tag in zip(texts, tags, strict=True)
    ]


def test_a_run_and_its_saved_model_say_the_same(run, saved):
    wanted = by_signature(saved, TEXTS, TAGS)
    assert any(wanted) and wanted[1] == ""
    for folder in (run[0], str(saved)):
        translator = gshard_translate.load(folder)
        assert translator(TEXTS, TAGS) == wanted
        assert translator.languages == ("de", "fr", "ru", "sr_Latn")
        # One tag for all; more texts than are translated at a time.
        assert translator(TEXTS[:1] * 70, "de") == wanted[:1] * 70
        assert translator((text for text in TEXTS[:1]), ["de"]) == wanted[:1]
        assert translator([], "de") == [] == translator([], [])


def test_a_run_can_be_searched_otherwise(run, toy_vocabulary):
    greedy = Translator(run[1], toy_vocabulary, beam_size=1, alpha=0.5)
    wanted = greedy.translate(TAGS, TEXTS)
    assert gshard_translate.load(run[0], beam_size=1, alpha=0.5)(TEXTS, TAGS) == wanted


@pytest.mark.parametrize("kind", ["run", "saved"])
def test_what_it_refuses_to_translate(kind, run, saved):
    translator = gshard_translate.load({"run": run[0], "saved": saved}[kind])
    for call, error, match in (
        (lambda: translator(["a"], "dee"), ValueError, "near it: de.*'dee'"),
        (lambda: translator(["a"], "sr"), ValueError, "near it: sr_Latn.*'sr'"),
        (lambda: translator(["a"], "de-AT"), ValueError, "look like de.*near it: de"),
        (lambda: translator([], "xx"), ValueError, "4 languages of this translator"),
        (lambda: translator(["a", "b"], ["de", "xx"]), ValueError, "'xx'"),
        (lambda: translator(["a", "b"], ["de"]), ValueError, "1 tags and 2 texts"),
        (lambda: translator("Guten Tag", "de"), TypeError, "list of strings.*'Guten"),
        (lambda: translator([b"a"], "de"), TypeError, "type bytes"),
        (lambda: translator(["a"], [None]), TypeError, "type NoneType"),
    ):
        with pytest.raises(error, match=match):
            call()


def test_folders_that_hold_no_translator(run, saved, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    (tmp_path / "begun").mkdir()
    for name in ("settings.json", "vocab.model"):
        (tmp_path / "begun" / name).write_bytes((run[0] / name).read_bytes())
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "saved_model.pb").write_bytes(b"\xff" * 40)
    tf.saved_model.save(tf.Module(), str(tmp_path / "another"))
    for name, error, match in (
        ("nothing", FileNotFoundError, "nothing', which is missing"),
        ("file", FileNotFoundError, "which is a file"),
        ("empty", FileNotFoundError, "which holds nothing"),
        (".", FileNotFoundError, "settings.json.*which holds another, begun"),
        ("begun", FileNotFoundError, "no checkpoint yet"),
        ("damaged", ValueError, "cannot be loaded"),
        ("another", ValueError, "must have the signature 'translate'"),
    ):
        with pytest.raises(error, match=match):
            gshard_translate.load(tmp_path / name)
    with pytest.raises(ValueError, match="left out for a SavedModel.*beam_size=2"):
        gshard_translate.load(saved, beam_size=2)
    with pytest.raises(ValueError, match="disk of this machine"):
        gshard_translate.load("gs://bucket/run")


def test_the_package_alone_loads_no_tensorflow():
    code = (
        "import sys, gshard_examples.translation as t; t.load; "
        "sys.exit('tensorflow' in sys.modules or 'keras' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
