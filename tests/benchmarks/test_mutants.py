"""The mutants fit the code as it is, and the script that runs them can tell."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter

import pytest
from processes import PYTHONPATH, ROOT, run_python

from benchmarks.mutants.__main__ import SUBJECTS, chosen, summary
from benchmarks.mutants.mutant import Mutant, check

MUTANTS = [mutant for mutants in SUBJECTS.values() for mutant in mutants]
# Caught in a second, by a test that computes nothing.
QUICK = "two dimensions may be split over one mesh axis"


def test_every_text_occurs_once_and_every_test_exists():
    check(MUTANTS, ROOT)


def test_there_are_many_of_each_subject():
    assert len(MUTANTS) >= 60
    assert min(len(mutants) for mutants in SUBJECTS.values()) >= 10
    told = Counter((m.file, m.text, m.replacement) for m in MUTANTS)
    assert max(told.values()) == 1
    survivors = [m for m in MUTANTS if m.survives is not None]
    assert len(survivors) <= 0.05 * len(MUTANTS)
    assert all(len(m.survives.split()) > 5 for m in survivors)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"text": "no such text"}, "no such text', 0 times"),
        ({"text": "import"}, "'import', "),
        ({"text": "ROUNDS = 13", "replacement": "ROUNDS = 13"}, "differ from its"),
        ({"file": "gshard_tf/no_such_file.py"}, "no_such_file.py"),
        ({"tests": ("tests/no_such_file.py",)}, "tests/no_such_file.py"),
        (
            {"tests": ("tests/gshard_tf/io/test_atomic_files.py::test_none",)},
            "test_atomic_files.py::test_none",
        ),
    ],
    ids=["gone", "not once", "no change", "no file", "no test file", "no test"],
)
def test_a_mutant_that_is_out_of_date_is_an_error(change, said):
    right = {
        "file": "gshard_tf/random/threefry.py",
        "text": "ROUNDS = 13",
        "replacement": "ROUNDS = 12",
        "tests": ("tests/gshard_tf/io/test_atomic_files.py::test_full_disk[x]",),
        "breaks": "nothing",
    }
    check([Mutant(**right)], ROOT)
    with pytest.raises(ValueError, match="out of date") as error:
        check([Mutant(**{**right, **change})], ROOT)
    assert said in str(error.value)


def test_a_survivor_that_nobody_knows_of_is_not_expected():
    def result(verdict, expected):
        return {
            "subject": "routing",
            "file": "a.py",
            "breaks": "it",
            "verdict": verdict,
            "expected": expected,
        }

    found = summary(
        [result("caught", True), result("survived", True), result("survived", False)]
    )
    assert found["unexpected"] == ["survived: a.py: it"]
    counts = {"mutants": 3, "caught": 1, "survived": 2}
    assert found["by_subject"] == {"routing": counts}
    assert found | counts == found and found["survivors_explained"] == 1


def test_a_pattern_that_matches_none():
    with pytest.raises(ValueError, match="only='no such fault'"):
        chosen("no such fault")


# The script with two mutants in place of all: one that a test catches, and one that
# nothing can.
_TWO = """
import os
import sys
import tempfile

os.environ["TMPDIR"] = tempfile.tempdir = {folder!r}
from benchmarks.mutants import __main__ as script
from benchmarks.mutants.mutant import Mutant

[(subject, quick)] = script.chosen({quick!r})
harmless = Mutant(
    quick.file, "usual ones (", "common ones (", quick.tests, "a word of a docstring"
)
script.SUBJECTS = {{"strategy": (quick, harmless)}}
sys.argv = ["mutants", "--json"]
try:
    script.main()
except SystemExit as end:
    assert end.code == 1
"""


def test_the_script_tells_what_is_caught_from_what_survives(tmp_path):
    [(_, quick)] = chosen(QUICK)
    before = (ROOT / quick.file).read_text("utf-8")
    printed = run_python(_TWO.format(quick=QUICK, folder=str(tmp_path)))
    found = json.loads(printed)
    caught, survived = found["results"]
    assert caught["verdict"] == "caught" and caught["expected"]
    assert caught["by"].startswith(quick.tests[0].partition("::")[0])
    assert survived["verdict"] == "survived" and not survived["expected"]
    assert found["unexpected"] == [
        "survived: gshard_tf/sharding/rules.py: a word of a docstring"
    ]
    # Nothing is left, and nothing was changed.
    assert list(tmp_path.iterdir()) == []
    assert (ROOT / quick.file).read_text("utf-8") == before


@pytest.mark.slow
def test_a_script_that_is_ended_leaves_nothing_behind(tmp_path):
    script = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.mutants", "--only", QUICK],
        cwd=ROOT,
        env={**os.environ, "TMPDIR": str(tmp_path), "PYTHONPATH": PYTHONPATH},
        stderr=subprocess.PIPE,
    )
    script.stderr.readline()  # a fork is about to run the tests
    log = tmp_path / "none"
    begun = time.monotonic()
    while not log.exists() and time.monotonic() - begun < 60:
        log = next(tmp_path.glob("mutants-*/log"), log)
        time.sleep(0.05)
    assert log.exists()
    script.terminate()
    script.communicate(timeout=60)
    assert script.returncode == 128 + signal.SIGTERM
    assert list(tmp_path.iterdir()) == []
