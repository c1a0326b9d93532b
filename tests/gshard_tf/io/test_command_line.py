"""`--config` and shell completion, the same for every command."""

import importlib.util
import re
import shutil
import subprocess
import tomllib

import pytest
from processes import ROOT, run_python

from gshard_examples.serving.__main__ import make_parser as serving
from gshard_examples.translation.cli import make_parser as translate
from gshard_tf.checkpoints import cli as checkpoints
from gshard_tf.export.runner import parser as run
from gshard_tf.planning import arguments as plan

COMMANDS = {
    "gshard-plan": (plan.parser, []),
    "gshard-run": (run, ["train.gshard"]),
    "gshard-translate": (translate, ["train"]),
    "python -m gshard_examples.serving": (serving, ["folder"]),
}


@pytest.fixture
def config(tmp_path):
    def write(text):
        path = tmp_path / "flags.toml"
        path.write_text(text, "utf-8")
        return str(path)

    return write


def parsed(command, arguments):
    """The options of a command, as a dict."""
    parser, first = COMMANDS[command]
    options = vars(parser().parse_args([*first, *arguments]))
    return {name: value for name, value in options.items() if name != "config"}


@pytest.mark.parametrize(
    ("command", "text", "flags"),
    [
        (
            "gshard-plan",
            'topology = ["cpu:2", "v3:2x2"]\nmesh = "data=2"\nrule = ["batch=data"]\n'
            'batch = "int32[8]"\nmode = "predict"\nno-cache = true',
            "--topology cpu:2 --topology v3:2x2 --mesh data=2 --rule batch=data "
            "--batch int32[8] --mode predict --no-cache",
        ),
        (
            "gshard-run",  # --data is required
            'data = "~/rows"\nsteps = 30\ngrace = 5\nevaluate = ["e.gshard", "dev"]',
            "--data ~/rows --steps 30 --grace 5 --evaluate e.gshard dev",
        ),
        (
            "gshard-translate",
            "steps = 7\nlearning_rate = 0.01\nstacked = true",
            "--steps 7 --learning-rate 0.01 --stacked",
        ),
        (
            "python -m gshard_examples.serving",
            'port = 9000\nhost = "::1"\ntimeout = 3',
            "--port 9000 --host ::1 --timeout 3",
        ),
    ],
)
def test_a_file_says_what_flags_would(command, text, flags, config):
    flags = flags.split()
    from_file = parsed(command, ["--config", config(text)])
    assert from_file == parsed(command, flags)
    if command != "gshard-run":
        assert from_file != parsed(command, [])


def test_flags_are_stronger_than_the_file(config):
    path = config('steps = 7\nstacked = true\nmesh = "data=2"')
    options = parsed("gshard-translate", ["--steps", "9", "--config", path])
    assert (options["steps"], options["stacked"]) == (9, True)
    options = parsed("gshard-translate", ["--config", path, "--no-stacked"])
    assert (options["steps"], options["stacked"]) == (7, False)
    # One that may be repeated is replaced, not continued.
    path = config('topology = ["cpu:2"]')
    flags = ["--topology", "v3:2x2", "--topology", "v4:2x2x1", "--config", path]
    assert parsed("gshard-plan", flags)["topology"] == ["v3:2x2", "v4:2x2x1"]


def test_subcommands_share_a_file(config):
    path = config("per-language = 3\nsteps = 7\nbeam-size = 2")
    evaluate = vars(translate().parse_args(["evaluate", "--config", path]))
    assert (evaluate["per_language"], evaluate["beam_size"]) == (3, 2)
    assert "steps" not in evaluate
    for arguments in (["--config", path, "list", "run"], ["list", "run"]):
        path = config("json = true")
        said = checkpoints.main([*arguments, "--config", path])
        assert said == 2  # no checkpoints there, and no traceback


def test_the_guide_s_file_is_one():
    text = (ROOT / "docs" / "commands.md").read_text("utf-8")
    [example] = re.findall(r"```toml\n(.*?)```", text, re.DOTALL)
    config = tomllib.loads(example)
    assert translate().take_defaults(config) == set(config)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("stepps = 3", "Near it: steps"),
        ("stepps = 3", "Received: stepps (see"),
        ("config = 'other.toml'", "Received: config (see"),
        ("help = true", "Received: help (see"),
        ("program = 'train.gshard'", "Received: program (see"),
        ("steps = 'many'", "steps must be a int value. Received: 'many'"),
        ("steps = true", "steps must be a string or a number. Received: True"),
        ("steps = [1]", "steps must be a string or a number. Received: [1]"),
        ("data = 'gs://bucket/rows'", "data: path must be on a disk"),
        ("platform = 'abacus'", "platform must be one of cpu, "),
        ("evaluate = 'e.gshard'", "evaluate must be a list. Received: 'e.gshard'"),
        ("evaluate = ['e.gshard']", "evaluate must be a list of 2"),
        ("log_every = 1\nlog-every = 2", "log-every twice"),
        ("steps = ", "must be a TOML file: Invalid value"),
        (None, "No such file"),
    ],
)
def test_what_a_file_must_not_say(text, said, config, tmp_path, capsys):
    path = tmp_path / "absent.toml" if text is None else config(text)
    with pytest.raises(SystemExit) as stopped:
        run().parse_args(["train.gshard", "--data", "d", "--config", str(path)])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert said in error and error.startswith("gshard-run: argument --config: ")
    assert len(error.splitlines()) == 1


def test_flags_without_a_value_are_true_or_false(config, capsys):
    assert parsed("gshard-plan", ["--config", config("no-cache = false")]) == parsed(
        "gshard-plan", []
    )
    with pytest.raises(SystemExit):
        parsed("gshard-plan", ["--config", config("no-cache = 'yes'")])
    assert "no-cache must be true or false. Received: 'yes'" in capsys.readouterr().err


def completed(script, function, words):
    """What bash offers for the last word of a command line."""
    code = (
        f'source {script}; COMP_WORDS=({words} ""); COMP_CWORD={len(words.split())}; '
        f'{function} x ""; printf "%s\\n" "${{COMPREPLY[@]}}"'
    )
    done = subprocess.run(
        ["bash", "-c", code], capture_output=True, text=True, check=True
    )
    return done.stdout.split()


@pytest.mark.skipif(
    not (importlib.util.find_spec("shtab") and shutil.which("bash")),
    reason="needs shtab (pip install 'gshard-tf[completion]') and bash",
)
def test_bash_completes_commands_and_choices(tmp_path, capsys):
    def script(main):
        with pytest.raises(SystemExit) as stopped:
            main(["--print-completion", "bash"])
        assert stopped.value.code == 0
        path = tmp_path / "completion"
        path.write_text(capsys.readouterr().out)
        [function] = re.findall(r"^complete .*-F (\S+) ", path.read_text(), re.M)
        return path, function

    from gshard_examples.translation.cli import main

    done = script(main)
    assert {"train", "translate"} <= set(completed(*done, "gshard-translate"))
    kinds = completed(*done, "gshard-translate train --optimizer")
    assert kinds == ["adam", "adamw", "adafactor"]
    done = script(plan.main)
    assert completed(*done, "gshard-plan --mode") == ["train", "evaluate", "predict"]
    done = script(checkpoints.main)
    assert completed(*done, "gshard-checkpoints") == ["list", "show", "verify"]


def test_completion_without_its_package_says_what_to_install():
    code = """
        import sys
        sys.modules["shtab"] = None
        from gshard_tf.export.runner import parser
        try:
            parser().parse_args(["--print-completion", "zsh"])
        except SystemExit as stopped:
            print(stopped.code)
    """
    assert run_python(code).strip() == "2"
