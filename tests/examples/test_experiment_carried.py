"""The experiment's folder for minutes of a GPU: small, completed, and back."""

import os
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
from processes import PYTHONPATH, ROOT, run_python

from benchmarks.experiment import (
    carrying,
    compact,
    preparing,
    results,
    scoring,
    unpacking,
)
from benchmarks.experiment.training import evaluations_of
from gshard_examples.translation.tokens import TokenizedSplit
from gshard_tf import export

#: Packages that the machine with the GPU may lack.
LACKING = ("tensorflow", "keras", "tensorflow_text", "sentencepiece")


def split(pairs, languages):
    """A split of (language, source, target)s."""
    language, sources, targets = zip(*pairs, strict=True)
    ends = [np.cumsum([0, *map(len, some)]) for some in (sources, targets)]
    return TokenizedSplit(
        languages,
        np.array(language, np.int32),
        np.concatenate(sources).astype(np.int32),
        ends[0],
        np.concatenate(targets).astype(np.int32),
        ends[1],
    )


def pairs_of(tokens):
    sources = np.split(tokens.source, tokens.source_starts[1:-1])
    targets = np.split(tokens.target, tokens.target_starts[1:-1])
    return sorted(
        (int(language), tuple(map(int, source)), tuple(map(int, target)))
        for language, source, target in zip(
            tokens.language, sources, targets, strict=True
        )
    )


def test_tokens_are_kept_and_each_message_once(tmp_path):
    rng = np.random.default_rng(0)
    messages = [(2, *rng.integers(4, 60000, n), 3) for n in rng.integers(1, 60, 40)]
    pairs = [
        (language, (5, *rng.integers(4, 99, rng.integers(1, 9)), 3), messages[number])
        for number in rng.integers(0, len(messages), 50)
        for language in rng.choice(5, 3, replace=False)
    ]
    tokens = split(pairs, tuple("abcde"))
    compact.write_tokens(tmp_path / "tokens.xz", tokens)
    back = compact.read_tokens(tmp_path / "tokens.xz")
    assert back.languages == tokens.languages
    assert pairs_of(back) == pairs_of(tokens)
    # Random ids do not compress: of each message there is one.
    once = 2 * sum(map(len, {message for _, _, message in pairs}))
    assert (tmp_path / "tokens.xz").stat().st_size < once + 2 * len(tokens.source) + 999


def test_what_16_bits_do_not_hold_is_refused(tmp_path):
    tokens = split([(0, (5, 2**16, 3), (2, 3))], ("a",))
    with pytest.raises(ValueError, match="less than 65,536. Received: 65536"):
        compact.write_tokens(tmp_path / "tokens.xz", tokens)


def test_a_drawn_state_is_like_the_first(tmp_path):
    rng = np.random.default_rng(0)
    arrays = {
        "normal": rng.normal(0, 0.1, (80, 90)).astype(np.float32),
        "uniform": rng.uniform(-2, 2, 9000).astype(np.float32),
        "low": rng.normal(0, 1, 9000).astype(ml_dtypes.bfloat16),
        "slot": np.zeros([40, 50], np.float32),
        "few": np.arange(5),
    }
    compact.write_start(tmp_path / "small.npz", arrays)
    first, again, other = (
        compact.draw_start(tmp_path / "small.npz", seed) for seed in (1, 1, 2)
    )
    for name, array in arrays.items():
        drawn = first[name]
        assert (drawn.shape, drawn.dtype) == (array.shape, array.dtype)
        np.testing.assert_array_equal(drawn, again[name])
        values, drawn = array.astype(float), drawn.astype(float)
        assert values.min() <= drawn.min() and drawn.max() <= values.max()
        # Means of 2,000 draws or more.
        error = 4 * values.std() / np.sqrt(array.size)
        np.testing.assert_allclose(drawn.mean(), values.mean(), atol=2 * error)
        np.testing.assert_allclose(drawn.std(), values.std(), rtol=0.05)
    np.testing.assert_array_equal(first["slot"], 0)
    np.testing.assert_array_equal(first["few"], arrays["few"])
    assert (first["normal"] != arrays["normal"]).mean() > 0.9
    assert (first["normal"] != other["normal"]).mean() > 0.9


def test_a_folder_that_is_too_large_is_refused(tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "large").write_bytes(bytes(3000))
    monkeypatch.setattr(carrying, "LIMIT", 3000)
    assert carrying.check_size(tmp_path) == 3000
    (tmp_path / "small").write_bytes(bytes(1))
    with pytest.raises(ValueError, match=r"must have at most .*\(large .*, small "):
        carrying.check_size(tmp_path)


def test_what_runs_there_needs_no_tensorflow():
    code = f"""
        import sys
        sys.modules |= dict.fromkeys({LACKING})
        import gshard_examples.translation.packed_batches
        import gshard_examples.translation.settings
        import benchmarks.experiment.training
        import benchmarks.experiment.unpacking
        # The parent of processes that have it.
        assert "jax" not in sys.modules
    """
    run_python(code, loaded=False)


def command_there(folder, *arguments):
    """Runs a command of the experiment where `LACKING` cannot be imported."""
    without = folder / "without"
    without.mkdir(exist_ok=True)
    for name in LACKING:
        (without / f"{name}.py").write_text("raise ImportError('not here')\n")
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.experiment.run", *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": f"{without}{os.pathsep}{PYTHONPATH}"},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    return done.stdout + done.stderr


@pytest.mark.slow
def test_the_way_to_a_gpu_and_back(toy_corpus, tmp_path):
    home, there, back = tmp_path / "home", tmp_path / "there", tmp_path / "back.zip"
    preparing.prepare(toy_corpus.path, home, "quick15")
    programs = list(home.glob("*/*.gshard"))
    assert len(programs) == 2 * 3
    for program in programs:
        # A call that CUDA does not have is refused when a program is saved.
        assert {"cpu", "cuda"} <= set(export.read_manifest(program).platforms)
    said = command_there(tmp_path, "unpack", "--packed", home, "--out", there)
    assert said.count(" compiled in ") == len(programs)
    train = ("train", "--out", there, "--zip", back)
    # Without time, a run is evaluated where it is, and goes on when it has time.
    command_there(tmp_path, *train, "--each", "0.001", "--only", "e64-0")
    assert list(evaluations_of(there / "e64-0" / "new-pairs")) == [0]
    compiled = sorted((there / "cache").iterdir())
    command_there(tmp_path, *train, "--each", "9")
    assert sorted((there / "cache").iterdir()) == compiled
    unpacking.collect(toy_corpus.path, home, back)
    for run in ("dense-0", "e64-0"):
        assert list(evaluations_of(home / run / "run"))[-2:] == [2, 4]
        assert 4 in evaluations_of(home / run / "new-pairs")
        assert not (home / run / "run" / "state.npz").exists()
    scoring.score(toy_corpus.path, home, None, tmp_path / "kept")
    rows = results.read_results(tmp_path / "kept")["rows"]
    assert {row["run"]: row["steps"] for row in rows} == {"dense-0": 4, "e64-0": 4}
