"""The experiment's four commands, from a corpus to the plots, with sizes that say
nothing."""

import numpy as np
import pytest

from benchmarks.experiment import design, preparing, report, scoring, sharing, training
from benchmarks.experiment.design import Run
from benchmarks.experiment.results import keep_baselines, read_results


@pytest.mark.slow
def test_the_experiment_runs_whole(toy_corpus, tmp_path, monkeypatch, capsys):
    runs = (Run("dense", 0), Run("e4", 0))
    for module in (design, training):
        monkeypatch.setattr(module, "RUNS", runs)
    preparing.prepare(toy_corpus.path, tmp_path, "quick")
    before = (tmp_path / "e4-0" / "train.gshard").stat().st_mtime_ns
    preparing.prepare(toy_corpus.path, tmp_path, "quick")
    assert (tmp_path / "e4-0" / "train.gshard").stat().st_mtime_ns == before
    with pytest.raises(ValueError, match="Received: e8-0"):
        training.train(tmp_path, ["e8-0"], None)
    training.train(tmp_path, ["dense-0"], None)
    training.train(tmp_path, [], None)
    assert list(training.evaluations_of(tmp_path / "e4-0" / "run")) == [2, 4]
    assert list(training.evaluations_of(tmp_path / "e4-0" / "new-pairs")) == [4]
    state = (tmp_path / "e4-0" / "run" / "state.npz").stat().st_mtime_ns
    training.train(tmp_path, [], None)  # nothing is left to do
    assert (tmp_path / "e4-0" / "run" / "state.npz").stat().st_mtime_ns == state
    kept = tmp_path / "results"
    training.measure(tmp_path, kept, rounds=1)
    scoring.score(toy_corpus.path, tmp_path, None, kept)
    said = capsys.readouterr().out
    assert "| e4-0 |" in said and "over a bilingual model" in said
    # A table of other days' runs needs their small files alone.
    results = read_results(kept)
    report.write_report(results, tmp_path / "again")
    assert capsys.readouterr().out in said
    assert set(results["times"]["seconds"]) == {"dense", "e4"}
    rows = {row["run"]: row for row in results["rows"]}
    assert [row["experts"] for row in rows.values()] == [0, 4, 0]
    assert rows["e4-0"]["parameters"] > rows["dense-0"]["parameters"]
    assert rows["e4-0"]["tokens"] == rows["dense-0"]["tokens"] > 0
    for row in scoring.losses(tmp_path):
        assert row["train_nll"] == rows[row["run"]]["train_nll"]
    pairs = results["scores"]["test_pairs"]
    (alone,) = (row for row in rows.values() if row["language"])
    of_language = pairs["dense-0"]["language"][alone["language"]]
    assert pairs[alone["run"]]["overall"]["pairs"] == of_language["pairs"]
    for picture in ("results/experts.png", "again/experts.png", "e4-0/sharing.png"):
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")


def test_results_are_of_one_corpus(tmp_path):
    with pytest.raises(ValueError, match="Received: none"):
        read_results(tmp_path)
    baselines = {"corpus": "one", "counts": {}, "scores": {}}
    keep_baselines(tmp_path, baselines)
    keep_baselines(tmp_path, baselines)
    with pytest.raises(ValueError, match="Received: other"):
        keep_baselines(tmp_path, baselines | {"corpus": "other"})
    with pytest.raises(ValueError, match="Received: none"):
        read_results(tmp_path)  # no run yet


def test_equal_flops_per_token():
    size = design.SIZES["cpu"]
    dense, wide, four, many = (
        design.settings_of(size, ["de"], Run(model, 0))
        for model in ("dense", "wide", "e4", "e64")
    )
    # Encoder and decoder have one layer of experts for each without.
    assert 2 * dense.hidden_dim == four.hidden_dim * (1 + four.capacity_factor)
    assert wide.hidden_dim == 2 * dense.hidden_dim
    assert dense.steps == four.steps == many.steps
    assert many.hidden_dim == four.hidden_dim


def test_pilots_differ_from_the_runs_in_sizes_alone():
    cpu = design.SIZES["cpu"]
    for name in ("pilot", "pilot-narrow", "pilot-broad", "pilot-deep"):
        size = design.SIZES[name]
        names = [run.name for run in design.all_runs(size, ["de"])]
        assert names == ["dense-0", "wide-0"]
        assert size.settings.keys() == cpu.settings.keys()
        same = ("vocab_size", "batch_tokens", "learning_rate", "schedule")
        assert all(size.settings[key] == cpu.settings[key] for key in same)


def test_languages_are_of_all_levels():
    counts = {f"l{i}": 1000 - i for i in range(10)} | {"few": 3}
    size = design.Size({}, 1, 1, least=200, every=3)
    assert design.chosen_languages(counts, size) == ["l0", "l3", "l6", "l9"]
    size = design.Size({}, 1, 1, bilingual=2)
    runs = design.all_runs(size, ["a", "b", "c", "d"])
    assert [run.name for run in runs[len(design.RUNS) :]] == ["only-a", "only-c"]
    assert len({run.name for run in runs}) == len(runs)


def test_shares_in_common():
    languages, common = sharing.similarity(
        {"a": np.array([0.5, 0.5, 0.0]), "b": np.array([0.0, 0.25, 0.75])}
    )
    assert languages == ["a", "b"]
    np.testing.assert_allclose(common, [[1, 0.25], [0.25, 1]])


def test_means_over_seeds():
    def scored(all_pairs, few):
        cell = {"pairs": 4, "bleu": 0.0}
        return {
            "overall": cell | {"chrf": all_pairs},
            "resources": {"fewer": cell | {"chrf": few}},
        }

    scores = {
        "copy": scored(1.0, 2.0),
        "memory": scored(3.0, 4.0),
        "dense-0": scored(5.0, 6.0),
        "dense-1": scored(6.0, 9.0),
        "e4-0": scored(7.0, 8.0),
    }
    rows = [{"run": run, "model": run[:-2]} for run in ("dense-0", "e4-0", "dense-1")]
    lines = report._by_level(rows, scores, "chrf").splitlines()
    assert lines[0] == "|  | pairs | copy | memory | dense | e4 |"
    assert lines[2:] == [
        "| all | 4 | 1.0 | 3.0 | 5.5 ± 0.5 | 7.0 |",
        "| fewer | 4 | 2.0 | 4.0 | 7.5 ± 1.5 | 8.0 |",
    ]


def test_gains_over_bilingual_models():
    def scored(bleu, **languages):
        each = {name: {"bleu": value} for name, value in languages.items()}
        return {"overall": {"bleu": bleu}, "language": each}

    names = ("dense-0", "dense-1", "e4-0", "only-de", "only-fr")
    rows = [
        {
            "run": name,
            "model": name.split("-")[0],
            "language": name[5:] if name.startswith("only") else "",
            "epochs": 2.0,
        }
        for name in names
    ]
    scores = {
        "dense-0": scored(0.0, de=2.0, fr=1.0),
        "dense-1": scored(0.0, de=4.0, fr=1.0),
        "e4-0": scored(0.0, de=6.0, fr=5.0),
        "only-de": scored(1.0),
        "only-fr": scored(3.0),
    }
    results = {"counts": {"de": 9, "fr": 7}, "scores": {"test_pairs": scores}}
    table = report._bilingual(rows[3:], rows[:3], results).splitlines()[2:]
    assert table[0].endswith("| epochs | bilingual, BLEU | dense | e4 |")
    assert table[2:] == [
        "| de | 9 | 2.0 | 1.0 | +2.0 | +5.0 |",
        "| fr | 7 | 2.0 | 3.0 | -2.0 | +2.0 |",
        "| mean |  |  |  | +0.0 | +3.5 |",
    ]
