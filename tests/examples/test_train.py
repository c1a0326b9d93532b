"""The main job on a toy corpus: train, stop, resume, score, export, answer."""

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time

import pytest
from processes import PYTHONPATH, run_python

from gshard_examples.translation import (
    cli,
    decoding_choice,
    evaluate,
    export,
    train,
)
from gshard_examples.translation import translator as translator_module
from gshard_examples.translation.baselines import ApertiumResult, TranslationMemory
from gshard_examples.translation.samples import sample_sentences
from gshard_examples.translation.score import score
from gshard_examples.translation.settings import Settings
from gshard_examples.translation.translator import Translator
from gshard_tf import CheckpointManager

TINY = {
    "row_lengths": "48,40",
    "batch_tokens": 384,
    "encoder_layers": 2,
    "decoder_layers": 1,
    "model_dim": 32,
    "hidden_dim": 48,
    "heads": 2,
    "experts": 8,
    "partitions": 2,
    "steps": 30,
    "steps_per_epoch": 10,
    "learning_rate": 5e-3,
    "warmup": 10,
    "schedule": "linear",
    "validation_pairs": 32,
}


@pytest.fixture(scope="module")
def corpus(toy_corpus):
    return toy_corpus


@pytest.fixture(scope="module")
def vocabulary(toy_vocabulary):
    return toy_vocabulary


@pytest.fixture(scope="module")
def run(corpus, vocabulary, tmp_path_factory):
    """A run of 30 steps on 2 partitions, without a stop."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    train.train(folder, Settings(**TINY), corpus, vocabulary, verbose=0)
    return folder


@pytest.fixture(scope="module")
def model(run):
    return train.load_model(run)[2]


@pytest.fixture(scope="module")
def translator(model, vocabulary):
    """Of the whole run, in its default way."""
    return Translator(model, vocabulary)


def without_time(row):
    assert row["seconds"] >= 0
    return {name: value for name, value in row.items() if name != "seconds"}


def test_it_learns_and_says_what_it_did(run):
    summary = json.loads((run / "summary.json").read_text())
    assert summary["val_nll"][-1] < summary["val_nll"][0] - 0.3
    assert len(train.read_history(run)) == 3
    layout = (run / "layout.txt").read_text()
    assert "expert,-,-" in layout and "slot of its weight" in layout
    assert list((run / "logs").glob("*/events*"))


def assert_goes_on_as(run, folder, corpus, vocabulary, **options):
    """The run in a folder, which was stopped, has the figures of the whole one."""
    train.train(folder, Settings(**TINY), corpus, vocabulary, **options)
    whole = train.read_history(run)
    parts = train.read_history(folder)
    assert [without_time(row) for row in parts] == [without_time(row) for row in whole]


def test_a_stopped_run_goes_on_as_the_whole_run_with_samples(
    run, model, corpus, vocabulary, tmp_path, capsys
):
    # As a kill in its last epoch leaves it.
    folder = tmp_path / "stopped"
    shutil.copytree(run, folder)
    shutil.rmtree(CheckpointManager(folder / "checkpoints").path(30))
    rows = (folder / "history.csv").read_text().splitlines(keepends=True)
    (folder / "history.csv").write_text("".join(rows[:-1]))
    assert train.last_step(folder) == 20 and len(train.read_history(folder)) == 2
    assert_goes_on_as(run, folder, corpus, vocabulary, samples=2)
    # Two samples were printed, and are what the whole run's model says.
    lines = capsys.readouterr().out.splitlines()
    said = [line for line in lines if line.split()[:1] == ["model"]]
    assert len(said) == 2 and len(lines) == 2 + 2 + 3 * 2
    pairs = sample_sentences(train.sample_pairs(corpus, "dev", 32), 2)
    texts = Translator(model, vocabulary, beam_size=1).translate(
        [p.lang for p in pairs], [p.source for p in pairs]
    )
    for line, text in zip(said, texts, strict=True):
        assert f"model  {text}".startswith(line.strip().removesuffix("…"))
    assert "encoder_2_moe_dropped" in (folder / "train.log").read_text()


@pytest.mark.slow
def test_a_short_run_goes_on_as_a_long_one(run, corpus, vocabulary, tmp_path):
    first = Settings(**TINY | {"steps": 10})
    train.train(tmp_path / "run", first, corpus, vocabulary, verbose=0)
    assert_goes_on_as(run, tmp_path / "run", corpus, vocabulary, verbose=0)


@pytest.mark.slow
@pytest.mark.parametrize(
    "mesh",
    [
        {"partitions": 0},
        {"partitions": 8},
        {"mesh": "data=2,expert=4"},
        {"mesh": "data=4,model=2"},
    ],
)
def test_other_partitions_are_the_same_run(mesh, run, corpus, vocabulary, tmp_path):
    """Plain Keras, without any strategy, and other meshes give the same figures."""
    settings = Settings(**TINY | {"steps": 10} | mesh)
    train.train(tmp_path / "run", settings, corpus, vocabulary, verbose=0)
    [ours] = train.read_history(tmp_path / "run")
    theirs = train.read_history(run)[0]
    assert without_time(ours) == pytest.approx(without_time(theirs), rel=1e-3)


def test_another_run_in_the_same_folder_is_refused(run, corpus, vocabulary):
    other = Settings(**TINY | {"model_dim": 64})
    with pytest.raises(ValueError, match="begun with model_dim=32"):
        train.train(run, other, corpus, vocabulary, verbose=0)


def test_scores_beside_the_baselines(translator, corpus, tmp_path):
    sets = {
        name: evaluate.choose(corpus.read(name), 3, None, 0)
        for name in ("test", "test_pairs")
    }
    scores = evaluate.evaluate(translator, corpus, sets, tmp_path, print)
    memory = TranslationMemory(corpus.read("train"))
    assert (tmp_path / "scores.png").stat().st_size > 5_000
    for name, pairs in sets.items():
        out = tmp_path / f"evaluation-{name}"
        assert set(scores[name]) == {"model", "memory", "copy"}
        assert scores[name]["copy"]["overall"]["pairs"] == len(pairs) > 0
        assert re.search(r"model +memory +copy\n", (out / "scores.txt").read_text())
        # Each set has its own translations, and its own sources' neighbors.
        alone = score(pairs, memory.translate(pairs), corpus.languages())
        assert scores[name]["memory"] == alone
        rows = (out / "translations.tsv").read_text("utf-8").splitlines()
        said = translator.translate([p.lang for p in pairs], [p.source for p in pairs])
        assert [tuple(row.split("\t")) for row in rows] == [
            (p.lang, p.source, p.english, text)
            for p, text in zip(pairs, said, strict=True)
        ]


@pytest.mark.slow
def test_the_command_tests_on_new_messages_and_new_pairs(run, corpus, capsys):
    command = ["evaluate", "--run", str(run), "--data", str(corpus.path)]
    assert cli.main([*command, "--per-language", "2", "--beam-size", "1"]) == 0
    printed = capsys.readouterr().out
    for name in ("test", "test_pairs"):
        assert re.search(rf"^{name}: \d+ pairs\n\n.* memory +copy\n", printed, re.M)
        assert (run / f"evaluation-{name}" / "scores.json").is_file()
    assert cli.main([*command, "--per-language", "0"]) == 2
    assert "Received: --split test test_pairs" in capsys.readouterr().err


def test_scores_beside_apertium(translator, corpus, tmp_path, monkeypatch):
    pairs = evaluate.choose(corpus.read("test"), 3, None, 0)
    german = [i for i, pair in enumerate(pairs) if pair.lang == "de"]
    # As if it had the pair de-en, and were never wrong.
    monkeypatch.setattr(
        evaluate,
        "translate_with_apertium",
        lambda pairs: ApertiumResult(german, [pairs[i].english for i in german]),
    )
    evaluate.evaluate(translator, corpus, {"toy": pairs}, tmp_path, print)
    out = tmp_path / "evaluation-toy"
    beside = json.loads((out / "scores-apertium.json").read_text())
    assert set(beside) == {"apertium", "model", "memory", "copy"}
    assert beside["apertium"]["overall"]["chrf"] == 100
    assert {s["overall"]["pairs"] for s in beside.values()} == {len(german)}
    assert f"The {len(german)} pairs" in (out / "scores.txt").read_text()


def job(folder, corpus, vocabulary, **settings):
    """Python that trains a small dense model in `folder` as the command does."""
    small = {"experts": 0, "partitions": 0, "encoder_layers": 1, "decoder_layers": 1}
    settings = TINY | small | settings
    return f"""
        import sys
        import gshard_tf
        from gshard_examples.translation import cli, corpus
        from gshard_examples.translation.settings import Settings
        from gshard_examples.translation.vocabulary import Vocabulary
        found = corpus.load_corpus({str(corpus.path)!r})
        model = Vocabulary({vocabulary.model_bytes!r})
        cli._prepare = lambda options: (Settings(**{settings!r}), found, model)
        folder = {str(folder)!r}
        sys.exit(cli.main(["train", "--run", folder, "--data", folder + "-data"]))
    """


@pytest.mark.slow
@pytest.mark.parametrize("kind", [signal.SIGKILL, signal.SIGINT])
def test_the_command_goes_on_after(kind, corpus, vocabulary, tmp_path):
    """Stopped in the middle of an epoch; what is there is whole, and it finishes."""
    folder = tmp_path / "stopped"
    code = job(folder, corpus, vocabulary, steps=60)
    # A shell may have told its background jobs to ignore Ctrl-C.
    listening = (
        "import signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", f"{listening}\n{textwrap.dedent(code)}"],
        env=os.environ | {"PYTHONPATH": PYTHONPATH},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    # As soon as the first checkpoint is there, stop it, within the next epoch.
    deadline = time.monotonic() + 200
    while not list((folder / "checkpoints").glob("step-*")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(kind)
    printed, _ = process.communicate()
    if kind == signal.SIGINT:
        assert process.returncode == 130
        assert "the same command resumes" in printed and "Traceback" not in printed
    done = len(train.read_history(folder))
    assert 1 <= done < 6
    run_python(code, timeout=300)
    assert len(train.read_history(folder)) == 6


@pytest.mark.slow
def test_a_full_disk_loses_no_checkpoint(corpus, vocabulary, tmp_path):
    """Files may grow to 64 KiB only: the next checkpoint does not fit."""
    folder = tmp_path / "full"
    run_python(job(folder, corpus, vocabulary, steps=10))
    checkpoints = CheckpointManager(folder / "checkpoints")
    assert checkpoints.steps() == [10]
    code = textwrap.dedent(job(folder, corpus, vocabulary, steps=20))
    limit = "import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))"
    done = subprocess.run(
        [sys.executable, "-c", f"{limit}\n{code}"],
        env=os.environ | {"PYTHONPATH": PYTHONPATH},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 2, done.stderr[-2000:]
    assert f"could not write {checkpoints.path(20)}" in done.stderr
    assert "Traceback" not in done.stderr
    assert checkpoints.steps() == [10]
    run_python(code)
    assert len(train.read_history(folder)) == 2


@pytest.fixture(scope="module")
def saved_model(translator, tmp_path_factory):
    folder = tmp_path_factory.mktemp("export") / "saved_model"
    return export.export(translator, folder), translator


TEXTS = ["appleo basketo candleo", "", "x " * 25_000, "gardenen hammeren"]
TAGS = ["fr", "de", "ru", "de"]

BARE = """
    import json, sys
    import tensorflow as tf
    import tensorflow_text
    loaded = tf.saved_model.load(sys.argv[1] if len(sys.argv) > 1 else PATH)
    translate = loaded.signatures["serving_default"]
    def ask(texts, tags):
        found = translate(texts=tf.constant(texts, tf.string),
                          languages=tf.constant(tags, tf.string))
        return [t.decode() for t in found["translations"].numpy()]
    graph = translate.graph.as_graph_def()
    nodes = [n for f in graph.library.function for n in f.node_def]
    try:
        ask(["a"], ["nowhere"])
        refused = ""
    except tf.errors.InvalidArgumentError as error:
        refused = str(error)
    print(json.dumps({
        "all": ask(TEXTS, TAGS), "one": ask(TEXTS[:1], TAGS[:1]), "none": ask([], []),
        "bytes": ask([b"\\xff\\xfe abc"], ["de"]),
        "refused": refused, "ops": sorted({n.op for n in nodes}),
        "devices": sorted({n.device for n in nodes}),
        "ours": [m for m in sys.modules if m.startswith(("gshard", "keras_layers"))],
    }))
"""


def test_the_saved_model_answers_in_a_bare_process(saved_model):
    folder, translator = saved_model
    head = f"PATH, TEXTS, TAGS = {str(folder)!r}, {TEXTS!r}, {TAGS!r}\n"

    answer = json.loads(
        run_python(head + textwrap.dedent(BARE), with_repo=False).splitlines()[-1]
    )
    assert answer["all"] == translator.translate(TAGS, TEXTS)
    assert answer["one"] == answer["all"][:1]
    assert answer["none"] == []
    assert len(answer["bytes"]) == 1
    assert "unknown language tag" in answer["refused"]
    assert answer["ours"] == []
    assert "XlaSharding" not in answer["ops"]
    assert not [d for d in answer["devices"] if "CPU" in d or "GPU" in d]


@pytest.mark.slow
def test_the_saved_model_answers_saved_model_cli(saved_model):
    folder, translator = saved_model
    # The tool knows tensorflow-text's operations once the package is imported.
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "import tensorflow_text\n"
            "from tensorflow.python.tools.saved_model_cli import main\n"
            "main()",
            *("run", "--dir", str(folder), "--tag_set", "serve"),
            *("--signature_def", "serving_default"),
            *("--input_exprs", "texts=['gardenen hammeren'];languages=['de']"),
        ],
        capture_output=True,
        text=True,
        env=os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3"},
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    [expected] = translator.translate(["de"], ["gardenen hammeren"])
    assert repr(expected.encode())[2:-1] in done.stdout


def test_evaluate_chooses_how_to_decode_on_dev_pairs(
    run, corpus, tmp_path, monkeypatch, capsys
):
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    seen = []
    choose = decoding_choice.choose_decoding

    def watched(model, vocabulary, pairs):
        seen.append(pairs)
        return choose(model, vocabulary, pairs[:4], beam_sizes=(1, 2), alphas=(1.0,))

    monkeypatch.setattr(decoding_choice, "choose_decoding", watched)
    evaluated = []

    def scored(translator, corpus, sets, out, progress):
        evaluated.append(translator)
        for name in sets:
            (out / f"evaluation-{name}").mkdir(exist_ok=True)
            (out / f"evaluation-{name}" / "scores.txt").write_text("")

    monkeypatch.setattr(evaluate, "evaluate", scored)
    command = ["evaluate", "--run", str(folder), "--data", str(corpus.path)]
    command += ["--per-language", "1"]
    # Both given: nothing is chosen.
    assert cli.main([*command, "--beam-size", "3", "--alpha", "0.7"]) == 0
    assert not seen and not (folder / "decoding.json").exists()
    assert cli.main(command) == 0
    assert {pair for pair in seen[0]} <= set(corpus.read("dev"))
    record = json.loads((folder / "decoding.json").read_text())
    assert record["step"] == 30 and record["pairs"] == 4
    # Once for each checkpoint.
    assert cli.main(command) == 0 and len(seen) == 1
    printed = capsys.readouterr().out
    assert "the best of 2 ways" in printed and "as chosen before" in printed
    ways = [(each.beam_size, each.alpha) for each in evaluated]
    chosen = (record["beam_size"], record["alpha"])
    assert ways == [(3, 0.7), chosen, chosen]


def test_what_was_chosen_is_what_translates_and_is_exported(
    run, tmp_path, monkeypatch, capsys
):
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    (folder / "decoding.json").write_text('{"beam_size": 3, "alpha": 1.5, "step": 1}')
    made = []

    class Watched(Translator):
        def __init__(self, *arguments, **options):
            made.append((options["beam_size"], options["alpha"]))
            super().__init__(*arguments, **options)

    monkeypatch.setattr(translator_module, "Translator", Watched)
    monkeypatch.setattr(export, "export", lambda translator, *_, **__: translator)
    for flags in ([], ["--beam-size", "1"], ["--alpha", "0.5"]):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"")))
        assert cli.main(["translate", "de", "--run", str(folder), *flags]) == 0
    assert cli.main(["export", "--run", str(folder)]) == 0
    assert made == [(3, 1.5), (1, 1.5), (3, 0.5), (3, 1.5)]


@pytest.mark.parametrize(
    ("typed", "lines"),
    [
        (b"", 0),
        (b"gardenen\n\n\xff\xfe abc\n" + b"x " * 25_000, 4),
        pytest.param(b"\n", 1, marks=pytest.mark.slow),
    ],
)
def test_the_translate_command(run, typed, lines, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(typed)))
    assert cli.main(["translate", "de", "--run", str(run)]) == 0
    assert len(capsys.readouterr().out.splitlines()) == lines


def test_the_translate_command_and_an_unknown_language(run, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a")))
    assert cli.main(["translate", "xx", "--run", str(run)]) == 2
    assert "Received: 'xx'" in capsys.readouterr().err


def test_unknown_languages_are_refused_by_name(saved_model):
    _, translator = saved_model
    with pytest.raises(ValueError, match="'xx'"):
        translator.translate(["xx"], ["a"])
    with pytest.raises(ValueError, match="1 tags and 2 texts"):
        translator.translate(["de"], ["a", "b"])


def test_an_epoch_that_was_trained_again_counts_once(tmp_path):
    """A kill between row and checkpoint; a disk that was full in a row."""
    (tmp_path / "history.csv").write_text("epoch,loss\n0,3\n1,2.5\n1,2\n2")
    rows = [{"epoch": 0, "loss": 3}, {"epoch": 1, "loss": 2}]
    assert train.read_history(tmp_path) == rows
