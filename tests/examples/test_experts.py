"""The experiment's four commands, from a corpus to the plot, with sizes that say
nothing."""

import json

import pytest

from benchmarks.experiment import run


@pytest.mark.slow
def test_the_experiment_runs_whole(toy_corpus, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run, "EXPERTS", (0, 4))
    monkeypatch.setattr(run, "SEEDS", (0,))
    run.prepare(toy_corpus.path, tmp_path, "quick")
    before = (tmp_path / "e4-0" / "train.gshard").stat().st_mtime_ns
    run.prepare(toy_corpus.path, tmp_path, "quick")
    assert (tmp_path / "e4-0" / "train.gshard").stat().st_mtime_ns == before
    run.train(tmp_path)
    run.train(tmp_path)  # nothing is left to do
    evaluations, training = run.read_log(tmp_path / "e4-0")
    assert list(evaluations) == [2, 4] and training
    with pytest.raises(SystemExit, match="Measure the steps first"):
        run.score(toy_corpus.path, tmp_path, None)
    run.measure(tmp_path, rounds=1)
    run.score(toy_corpus.path, tmp_path, None)
    assert "| 4 | 0 |" in capsys.readouterr().out
    rows = json.loads((tmp_path / "results.json").read_text())
    assert [row["experts"] for row in rows] == [0, 4]
    assert rows[1]["parameters"] > rows[0]["parameters"]
    assert (tmp_path / "experts.png").read_bytes().startswith(b"\x89PNG")


def test_equal_flops_per_token():
    size = run.SIZES["cpu"]
    dense, four, many = (
        run.settings_of(size, ["de"], number, 0) for number in (0, 4, 64)
    )
    # Encoder and decoder have one layer of experts for each without.
    assert 2 * dense.hidden_dim == four.hidden_dim * (1 + four.capacity_factor)
    assert dense.steps == four.steps == many.steps
    assert many.hidden_dim == four.hidden_dim
