"""What a training run prints, on a terminal and elsewhere, and what it logs."""

import io
import logging
import os
import shlex
import subprocess
import sys
import textwrap
import types

import pytest
from processes import PYTHONPATH
from rich.console import Console

from gshard_examples.translation import cli
from gshard_examples.translation.corpus import Pair
from gshard_examples.translation.next_commands import next_commands
from gshard_examples.translation.progress import (
    COLUMNS,
    Pace,
    TrainingProgress,
    log_file,
    print_samples,
)
from gshard_examples.translation.samples import is_due, sample_sentences
from gshard_examples.translation.settings import Settings
from gshard_tf.io.stderr_lines import without_lines

LOGS = {
    "loss": 5.25,
    "nll": 5.125,
    "encoder_2_moe_dropped": 0.07,
    "val_nll": 4.0625,
    "val_token_accuracy": 0.125,
}


class Clock:
    """Seconds that pass only when they are told to."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def test_pace_leaves_out_a_compilation_and_counts_validations():
    clock = Clock()
    pace = Pace(steps=30, steps_per_epoch=10, clock=clock)
    assert pace.minutes_left(0) is None
    pace.epoch_begins()
    for seconds in [60, *[2] * 9]:  # the first is compiled
        clock.now += seconds
        pace.step_ends()
    assert pace.step_seconds == 2
    assert pace.minutes_left(10) == pytest.approx(20 * 2 / 60)
    clock.now += 15  # validation, checkpoint
    pace.epoch_begins()
    assert pace.minutes_left(10) == pytest.approx((20 * 2 + 2 * 15) / 60)
    assert pace.minutes_left(30) == 0


def show(console, epochs=2, after=None):
    progress = TrainingProgress(
        console, steps=4, steps_per_epoch=2, tokens_per_step=0.01, after=after
    )
    optimizer = types.SimpleNamespace(iterations=0)
    progress.set_model(types.SimpleNamespace(optimizer=optimizer))
    with progress:
        progress.on_train_begin()
        for epoch in range(epochs):
            progress.on_epoch_begin(epoch)
            for batch in range(2):
                optimizer.iterations += 1
                progress.on_train_batch_end(batch, LOGS)
            progress.on_test_begin()
            progress.on_epoch_end(epoch, LOGS)


def test_elsewhere_than_on_a_terminal_it_is_a_line_per_validation():
    out = io.StringIO()
    done = []
    show(Console(file=out), after=done.append)
    lines = out.getvalue().splitlines()
    assert lines[0].split("  ")[-1] == "min left" and len(lines) == 3
    assert lines[1].split()[:4] == ["2", "5.125", "4.062", "12.5"]
    assert lines[2].split()[0] == "4" and lines[2].split()[-1] == "0.0"
    assert "moe" not in out.getvalue()
    assert all(c.isprintable() or c == "\n" for c in out.getvalue())
    assert max(map(len, lines)) <= len("  ".join(COLUMNS)) < 80
    assert done == [2, 4]


def test_on_a_terminal_a_line_moves_and_is_gone_at_the_end():
    out = io.StringIO()
    show(Console(file=out, force_terminal=True, width=80))
    text = out.getvalue()
    assert "2/4 training" in text and "validating" in text
    assert "tokens/s" in text and "min left" in text
    assert text.endswith("\x1b[2K")  # the moving line is wiped out
    shown = text.index("\x1b[?25l")  # the cursor is hidden, then back
    assert text.index("\x1b[?25h") > shown


def test_the_cursor_is_back_after_an_error():
    out = io.StringIO()
    console = Console(file=out, force_terminal=True)
    with pytest.raises(KeyboardInterrupt):
        with TrainingProgress(console, 4, 2, 100.0):
            raise KeyboardInterrupt
    assert "\x1b[?25h" in out.getvalue()


def test_all_figures_are_in_the_log_file(tmp_path):
    before = logging.getLogger("gshard_examples").level
    with log_file(tmp_path / "train.log"):
        show(Console(file=io.StringIO()))
        logging.getLogger("gshard_tf.elsewhere").info("said")
    logging.getLogger("gshard_examples").warning("after")
    text = (tmp_path / "train.log").read_text()
    assert text.count("encoder_2_moe_dropped 0.07") == 2 and "step 4: " in text
    assert "INFO gshard_tf.elsewhere: said" in text and "after" not in text
    assert logging.getLogger("gshard_examples").level == before


def test_samples_fit_the_screen_and_hold_no_control_character():
    out = io.StringIO()
    print_samples(
        Console(file=out, width=40),
        [("sr_Latn", "source " * 20, "\x1b[31mred\n\x07 [bold]text", "ok")],
    )
    lines = out.getvalue().splitlines()
    assert len(lines) == 3 and max(map(len, lines)) <= 40
    assert lines[0].split()[0] == "sr_Latn" and lines[0].endswith("…")
    assert lines[1].split()[0] == "model" and "[bold]text" in lines[1]
    assert lines[2].split() == ["reference", "ok"]
    assert out.getvalue().replace("\n", "").isprintable()


def test_sample_sentences_are_short_and_of_different_languages():
    pairs = [
        Pair(tag, "toy", text, "english")
        for tag in ("de", "fr", "ru", "sv", "uk")
        for text in ("short", "as long as it should be", "long " * 40)
    ]
    found = sample_sentences(pairs, 3)
    assert len({p.lang for p in found}) == 3
    assert {p.source for p in found} == {"as long as it should be"}
    assert len(sample_sentences(pairs, 9)) == 5
    assert sample_sentences(pairs[:1], 3) == []


@pytest.mark.parametrize(
    ("epochs", "due"),
    [(1, [1]), (3, [1, 2, 3]), (10, [2, 4, 6, 8, 10]), (12, [3, 6, 9, 12])],
)
def test_samples_are_shown_a_few_times_and_at_last(epochs, due):
    steps = 100 * epochs
    found = [e for e in range(1, epochs + 1) if is_due(100 * e, steps, 100)]
    assert found == due


# ---------------------------------------------------------------- the next commands


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"schedule": "linear", "steps": 300},
        {"languages": "de,fr", "stacked": True, "dropout": 0.0, "mesh": "data=2"},
        {"schedule": "cosine", "languages": "sr_Latn", "steps": 500},
    ],
)
def test_the_next_commands_are_commands(settings, tmp_path):
    run, data = tmp_path / "my run", tmp_path / "data"
    settings = Settings(**settings)
    ask, more, serve = (
        shlex.split(command)
        for _, command in next_commands(run, data, settings, run / "saved_model")
    )
    ask = ask[ask.index("gshard-translate") :]
    options = cli.make_parser().parse_args(ask[1:])
    assert options.command == "translate" and options.run == run
    assert settings.language_tags in (None, ["de", "fr"], [options.language])
    options = cli.make_parser().parse_args(more[1:])
    assert options.data == data
    found, steps = vars(cli._settings(options)), 2 * settings.steps
    assert found == vars(settings) | {"steps": steps}
    # What decays to 0 cannot go on.
    assert (options.run == run) == (settings.schedule == "linear")
    assert serve[1:] == ["-m", "gshard_examples.serving", str(run / "saved_model")]


# ---------------------------------------------------------------------- what is said


def run_quietly(code):
    """What a process of its own prints and says."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env=os.environ | {"PYTHONPATH": PYTHONPATH, "TF_CPP_MIN_LOG_LEVEL": "3"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


def test_only_the_named_lines_are_left_out():
    code = """
        import os, sys
        from gshard_tf.io.stderr_lines import without_lines
        with without_lines(["noise: "]):
            os.write(2, b"noise: 1\\nan error\\n noise: kept\\nno newline")
            print("python", file=sys.stderr)
        os.write(2, b"noise: later\\n")
    """
    said = "an error\n noise: kept\nno newlinepython\nnoise: later\n"
    assert run_quietly(code) == ("", said)


def test_lines_come_out_after_an_error_too(capfd):
    with pytest.raises(ValueError, match="x"):
        with without_lines(["noise"]):
            os.write(2, b"noise\nwhy\n")
            raise ValueError("x")
    assert capfd.readouterr().err == "why\n"


@pytest.mark.slow
def test_tensorflow_is_imported_without_a_word():
    code = """
        from gshard_tf.io.stderr_lines import import_quietly
        import_quietly("tensorflow_text")
        import sys
        assert "tensorflow_text" in sys.modules
    """
    assert run_quietly(code) == ("", "")
