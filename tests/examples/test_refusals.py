"""What the translator's command and its functions refuse, before they do anything."""

import json
import pathlib

import pytest

from gshard_examples.translation import (
    cli,
    evaluate,
    export,
    package_files,
    train,
    vocabulary_training,
)
from gshard_examples.translation.corpus import load_corpus, prepare_corpus
from gshard_examples.translation.settings import Settings

SMALL = {
    "row_lengths": "48,40",
    "batch_tokens": 384,
    "steps": 30,
    "steps_per_epoch": 10,
}


def test_settings_are_checked_and_come_back(tmp_path):
    settings = Settings(**SMALL)
    settings.write(tmp_path)
    assert Settings.read(tmp_path) == settings
    for wrong in (
        {"steps": 15},
        {"model_dim": 0},
        {"experts": -1},
        {"row_lengths": "64;40"},
        {"row_lengths": "64,2"},
    ):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            Settings(**SMALL | wrong)
    with pytest.raises(FileNotFoundError, match="Train one first"):
        Settings.read(pathlib.Path(tmp_path) / "nothing")
    earlier = vars(settings) | {"buckets": "16,48"}
    (tmp_path / "settings.json").write_text(json.dumps(earlier))
    with pytest.raises(ValueError, match=r"earlier version .*\['buckets'\]"):
        Settings.read(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--steps", "15"], "multiple of steps_per_epoch"),
        (["translate", "de", "--run", "/nonexistent/run"], "Train one first"),
        (["evaluate", "--run", "/nonexistent/run"], "Train one first"),
        (["prepare", "--data", "/nonexistent/S"], "Not installed: sentencepiece"),
        (["prepare", "--data", "/nonexistent/M", "--corpus", "M"], "folder=None"),
    ],
)
def test_the_command_answers_mistakes_with_a_sentence_at_once(
    arguments, message, capsys, monkeypatch
):
    def slow(module):
        raise AssertionError("TensorFlow takes seconds to start")

    monkeypatch.setattr(cli, "import_quietly", slow)
    if "sentencepiece" in message:
        monkeypatch.setattr(package_files, "find_spec", lambda module: None)
    assert cli.main(arguments) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "flag"),
    [
        ("run", "--run"),
        ("run", "--data"),
        ("run", "--saved-model"),
        ("train", "--run"),
        ("prepare", "--data"),
        ("evaluate", "--run"),
        ("export", "--saved-model"),
    ],
)
def test_remote_folders_are_refused_first(tmp_path, monkeypatch, capsys, command, flag):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        cli.main([command, flag, "gs://bucket/folder"])
    assert caught.value.code == 2
    said = capsys.readouterr().err
    assert f"argument {flag}" in said and "copy what is written there" in said
    assert "'gs://bucket/folder'" in said
    assert list(tmp_path.iterdir()) == []


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_run_of_an_earlier_version_is_refused(toy_vocabulary, tmp_path):
    """Its checkpoints are those of tf.train; nothing in its folder changes."""
    Settings(**SMALL).write(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "checkpoint").write_text("model_checkpoint_path: ...")
    (tmp_path / "vocab.model").write_bytes(toy_vocabulary.model_bytes)
    before = contents(tmp_path)
    other = Settings(**SMALL | {"steps": 60})
    for call in (
        lambda: train.train(tmp_path, other, None, toy_vocabulary),
        lambda: train.load_model(tmp_path),
    ):
        with pytest.raises(ValueError, match="must have checkpoints of gshard_tf"):
            call()
    assert contents(tmp_path) == before


@pytest.mark.parametrize("name", ["summary.json", "vocab.model", "history.csv"])
def test_a_folder_of_another_kind_is_no_run(tmp_path, name):
    (tmp_path / name).write_text("mine")
    with pytest.raises(FileExistsError, match=name):
        train.train(tmp_path, Settings(**SMALL), None, None)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_text() == "mine"


def test_remote_folders_are_refused_by_the_functions_too(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    remote = "ram://folder"
    for call in (
        lambda: train.train(remote, Settings(**SMALL), None, None),
        lambda: train.train("run", Settings(**SMALL), None, None, cache=remote),
        lambda: train.load_model(remote),
        lambda: export.export(None, remote),
        lambda: evaluate.evaluate(None, None, {}, remote, print),
        lambda: prepare_corpus(remote, sources=[]),
        lambda: load_corpus(remote),
        lambda: vocabulary_training.train_vocabulary(None, remote),
    ):
        with pytest.raises(ValueError, match="on a disk of this machine"):
            call()
    assert list(tmp_path.iterdir()) == []
