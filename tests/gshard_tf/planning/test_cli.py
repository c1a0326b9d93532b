"""`gshard-plan`: its arguments, exit statuses and files, and one real plan."""

import importlib.util
import json
import pathlib
import re
import shlex
import subprocess
import sys
import textwrap
import time

import keras
import plan_samples
import pytest
import tensorflow as tf
from processes import ROOT, run_python

import gshard_tf
from gshard_tf.planning import arguments as plan_command
from gshard_tf.planning import command as command_module
from gshard_tf.planning import planner
from gshard_tf.planning.plan import Plan
from gshard_tf.planning.search import find_layout
from gshard_tf.planning.search.candidates import Candidate
from gshard_tf.planning.search.layout_search import LayoutSearch, Trial
from gshard_tf.spmd.abstract import AbstractStrategy

BATCH = "(int32[8,4], int32[8,4]), int32[8,4]"


@pytest.fixture
def model_file(tmp_path):
    path = tmp_path / "small_model.py"
    path.write_text(
        textwrap.dedent("""
        import keras

        def build():
            model = keras.Sequential(
                [keras.layers.Input([4]), keras.layers.Dense(8), keras.layers.Dense(1)],
                name="small",
            )
            model.compile("adam", "mse")
            return model

        def with_batch():
            x, y = keras.KerasTensor([16, 4]), keras.KerasTensor([16, 1])
            return build(), (x, y)

        def fails():
            raise KeyError("no such width")

        nothing = 3
        """)
    )
    return path


@pytest.fixture
def asked(monkeypatch):
    """Replaces `plan`; what it was asked for. A v5e has too little memory."""
    calls = []

    def plan(model, topology, **arguments):
        with AbstractStrategy(gshard_tf.create_mesh({"expert": 1})).scope():
            built = model()
        calls.append({"model": built, "topology": topology, **arguments})
        if topology.startswith("unknown"):
            raise ValueError(f"No such topology. Received: topology={topology!r}")
        if topology.startswith("v5e"):
            return plan_samples.out_of_memory()
        return plan_samples.moe(topology=topology)

    monkeypatch.setattr(planner, "plan", plan)
    return calls


def command(capsys, *arguments):
    """Exit status, standard output and standard error of the command."""
    try:
        status = plan_command.main([str(a) for a in arguments])
    except SystemExit as stopped:
        status = stopped.code
    captured = capsys.readouterr()
    return status, captured.out, captured.err


# -- arguments --


def test_help_is_quick_and_documents_the_statuses():
    begun = time.perf_counter()
    done = subprocess.run(  # noqa: S603
        [sys.executable, "-X", "importtime", "-m", plan_command.__name__, "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert time.perf_counter() - begun < 3
    assert not re.search(r"\b(tensorflow|jax|keras|numpy)\b", done.stderr)
    for status in ("0  every", "1  an error", "2  bad input", "3  planned"):
        assert status in done.stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["FILE:build"], "--topology is missing"),
        (["--topology", "cpu:2"], "MODULE:FUNCTION is missing"),
        (["FILE", "--topology", "cpu:2"], "a colon and a function"),
        (["nowhere.py:build", "--topology", "cpu:2"], "no file 'nowhere.py'"),
        (["no_such_module:build", "--topology", "cpu:2"], "no module 'no_such_module'"),
        (["FILE:build", "--topology", "cpu:0"], "Received: 'cpu:0'"),
        (["FILE:build", "--topology", "v3"], "Received: 'v3'"),
        (["FILE:build", "--topology", "cpu:2", "--topology", "cpu:2"], "given twice"),
        (["FILE:build", "--topology", "cpu:2", "--mesh", "data"], "Received: 'data'"),
        (["FILE:build", "--topology", "cpu:2", "--mesh", "a=1,a=2"], "name of its own"),
        (["FILE:build", "--topology", "cpu:2", "--rule", "batch"], "Received: 'batch'"),
        (["FILE:build", "--topology", "cpu:2", "--mesh", "a=2", "--rule", "batch=b"],
         "must name an axis of the mesh, which has a"),
        (["FILE:build", "--topology", "cpu:2", "--rule", "x=a", "--rule", "x=b"],
         "two rules for 'x'"),
        (["FILE:build", "--topology", "cpu:2", "--batch", "int32[8"], "does not parse"),
        (["FILE:build", "--topology", "cpu:2", "--batch", "int33[8]"], "'int33'"),
        (["FILE:build", "--topology", "cpu:2", "--batch", "int32[n]"], "whole number"),
        (["FILE:build", "--topology", "cpu:2", "--batch", "int32[-1]"], "whole number"),
        (["FILE:build", "--topology", "cpu:2", "--batch", "f(1)"], "is no tensor"),
        (["FILE:build", "--topology", "cpu:2", "--batch", "{1: int32[2]}"], "a key is"),
        (["FILE:build", "--topology", "cpu:2", "--mode", "fit"], "invalid choice"),
        (["FILE:build", "--topology", "cpu:2", "--html", "no/where.html"], "a folder"),
        (["--compare", "a.json", "b.json"], "no file a.json"),
        (["--compare", "a", "b", "--topology", "cpu:2"], "--html only"),
        (["--compare", "a", "b", "--search"], "--html only"),
        (["FILE:build", "--topology", "v5e:2x2", "--search", "--mesh", "a=4"],
         "does not go with --mesh"),
        (["FILE:build", "--topology", "cpu:2", "--search"], "must be a TPU slice"),
        (["FILE:build", "--topology", "v5e:2x2", "--max-plans", "3"],
         "with --search only"),
        (["FILE:build", "--topology", "v5e:2x2", "--search", "--max-plans", "0"],
         "above 0. Received: '0'"),
        (["FILE:build", "--topology", "v5e:2x2", "--search", "--memory-limit", "1XB"],
         "such as 12GB"),
    ],
)  # fmt: skip
def test_bad_arguments(arguments, said, model_file, asked, capsys):
    arguments = [a.replace("FILE", str(model_file)) for a in arguments]
    status, out, err = command(capsys, *arguments)
    assert (status, out, asked) == (2, "", [])
    assert said in err
    assert len(err.splitlines()) == 1 and err.startswith("gshard-plan: ")


def test_a_page_without_its_library(model_file, asked, capsys, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name: None if name == "jinja2" else find(name),
    )
    status, out, err = command(
        capsys, f"{model_file}:build", "--topology", "cpu:2", "--html", "page.html"
    )
    assert (status, out, asked) == (2, "", [])
    assert "needs jinja2" in err and "pip install 'gshard-tf[html]'" in err


def test_batches():
    spec = plan_command.Spec
    assert plan_command.batch(BATCH) == (
        (spec((8, 4), "int32"), spec((8, 4), "int32")),
        spec((8, 4), "int32"),
    )
    assert plan_command.batch("float32[8]") == spec((8,), "float32")
    assert plan_command.batch("float32[]") == spec((), "float32")
    assert plan_command.batch("{x: bool[2], 'y z': [bfloat16[3, 1]]}") == {
        "x": spec((2,), "bool"),
        "y z": (spec((3, 1), "bfloat16"),),
    }
    for name in plan_command.DTYPES:
        assert tf.as_dtype(name).name == name


# -- what it does with them --


def test_what_plan_is_asked(model_file, asked, capsys):
    status, out, err = command(
        capsys, f"{model_file}:build", "--topology", "v3:8x8",
        "--mesh", "data=64,model=2",
        "--rule", "batch=data+model", "--rule", "mlp=model", "--rule", "embed=none",
        "--batch", BATCH, "--mode", "evaluate", "--no-cache",
    )  # fmt: skip
    assert status == 0
    [call] = asked
    assert call["model"].name == "small"
    assert call["topology"] == "v3:8x8"
    assert call["mesh"] == {"data": 64, "model": 2}
    rules = {"batch": "data+model", "mlp": "model", "embed": None}
    assert call["rules"].rules == rules
    ids = tf.TensorSpec([8, 4], tf.int32)
    assert call["batch"] == ((ids, ids), ids)
    assert (call["mode"], call["cache"]) == ("evaluate", False)
    assert out == f"{plan_samples.moe()}\n"
    assert "planning for v3:8x8" in err
    call["progress"]("compiling ...")
    assert capsys.readouterr().err == "gshard-plan: compiling ...\n"


def test_defaults_and_the_batch_of_the_function(model_file, asked, capsys):
    status, _, _ = command(capsys, f"{model_file}:with_batch", "--topology", "v3:8x8")
    assert status == 0
    [call] = asked
    assert isinstance(call["model"], keras.Model)
    assert [leaf.shape for leaf in call["batch"]] == [(16, 4), (16, 1)]
    assert (call["mesh"], call["rules"]) == (None, None)
    assert (call["mode"], call["cache"]) == ("train", True)


def test_a_module_instead_of_a_file(model_file, asked, capsys, monkeypatch):
    monkeypatch.chdir(model_file.parent)
    monkeypatch.setattr(sys, "path", list(sys.path))
    status, _, err = command(
        capsys, "small_model:with_batch", "--topology", "v3:8x8", "--batch", BATCH
    )
    assert status == 0, err
    assert len(asked[0]["batch"]) == 2  # what is given wins over what is returned


def test_several_topologies_write_files(model_file, asked, capsys, tmp_path):
    status, out, err = command(
        capsys, f"{model_file}:build", "--batch", BATCH,
        "--topology", "v3:8x8", "--topology", "v5e:2x4",
        "--json", tmp_path / "p.json", "--html", tmp_path / "p.html",
    )  # fmt: skip
    assert status == 3
    assert "OUT OF MEMORY" in out
    first = Plan.from_json((tmp_path / "p-v3-8x8.json").read_text())
    second = Plan.from_json((tmp_path / "p-v5e-2x4.json").read_text())
    assert (first.fits, second.fits) == (True, False)
    text = (tmp_path / "p.html").read_text()
    assert 'id="plan-1"' in text and "B / A" in text

    status, out, err = command(
        capsys, "--compare", tmp_path / "p-v3-8x8.json", tmp_path / "p-v5e-2x4.json",
        "--html", tmp_path / "both.html",
    )  # fmt: skip
    assert status == 0
    assert "OUT OF MEMORY" in out and "B / A" in out
    assert (tmp_path / "both.html").read_text() == text


@pytest.mark.parametrize("fits", [True, False])
def test_a_search(model_file, asked, capsys, monkeypatch, tmp_path, fits):
    calls = []

    def find(model, topology, batch, **options):
        with AbstractStrategy(gshard_tf.create_mesh({"expert": 1})).scope():
            calls.append({"model": model(), "topology": topology, **options})
        options["progress"]("plan 1 of at most 3")
        layout = Candidate({"data": 4}, {"batch": "data"})
        trial = Trial(layout, "planned", fits=fits, bytes_needed=2e9, seconds=1e-3)
        inputs = [str(spec.shape) for spec in batch]
        return LayoutSearch(
            "small", "train", topology, inputs, 12e9, [trial], [], (), None, 1.0
        )

    monkeypatch.setattr(find_layout, "find_layout", find)
    file = tmp_path / "found.json"
    status, out, err = command(
        capsys, f"{model_file}:with_batch", "--topology", "v5e:2x2", "--search",
        "--memory-limit", "12GB", "--max-plans", "3", "--json", file,
    )  # fmt: skip
    [call] = calls
    assert status == (0 if fits else 3) and asked == []
    assert call["model"].name == "small" and call["topology"] == "v5e:2x2"
    assert (call["memory_limit"], call["max_plans"]) == (12e9, 3)
    assert "gshard-plan: plan 1 of at most 3" in err
    assert ("gshard_tf.AxisRules(" if fits else "NOTHING FITS") in out
    assert (json.loads(file.read_text())["best"] is not None) == fits
    plan_command.main([f"{model_file}:with_batch", "--topology", "v5e:2x2", "--search"])
    assert "max_plans" not in calls[1] and calls[1]["memory_limit"] is None


def test_sizes():
    assert plan_command.memory("1.5GB") == 1.5e9
    assert plan_command.memory("900 MB") == 9e8
    assert plan_command.memory("12") == 12


def test_the_most_cpu_devices_are_asked_for_first(
    model_file, asked, capsys, monkeypatch
):
    counts = []
    monkeypatch.setattr(command_module, "request_cpu_devices", counts.append)
    command(
        capsys, f"{model_file}:build", "--batch", BATCH,
        "--topology", "cpu:2", "--topology", "v3:8x8", "--topology", "cpu:8",
    )  # fmt: skip
    assert set(counts) == {8}
    assert [call["topology"] for call in asked] == ["cpu:2", "v3:8x8", "cpu:8"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["FILE:fails", "--batch", BATCH, "--topology", "v3:8x8"],
         ":fails() failed: KeyError: 'no such width' (small_model.py, line"),
        (["FILE:fails", "--topology", "v3:8x8"], "'no such width'"),
        (["FILE:absent", "--topology", "v3:8x8"], "has no function 'absent'"),
        (["FILE:nothing", "--topology", "v3:8x8"], "has no function 'nothing'"),
        (["FILE:build", "--topology", "v3:8x8"], "Give it by --batch"),
        (["FILE:with_batch", "--topology", "v3:8x8", "--rule", "batch=data"],
         "by --mesh"),
        (["FILE:build", "--batch", BATCH, "--topology", "unknown:1"], "No such"),
    ],
)  # fmt: skip
def test_bad_input(arguments, said, model_file, asked, capsys):
    arguments = [a.replace("FILE", str(model_file)) for a in arguments]
    status, out, err = command(capsys, *arguments)
    assert (status, out) == (2, "")
    assert said in err
    assert "Traceback" not in err


def test_a_file_that_cannot_be_imported(tmp_path, asked, capsys):
    path = tmp_path / "broken_model.py"
    path.write_text("x = 1\nx +\n")
    status, _, err = command(capsys, f"{path}:build", "--topology", "v3:8x8")
    assert status == 2
    assert "broken_model.py failed: SyntaxError" in err and "line 2" in err


def test_errors_of_the_compiler_keep_their_traceback(
    model_file, asked, capsys, monkeypatch
):
    class CompilerError(RuntimeError):
        pass

    def plan(*arguments, **named):
        raise CompilerError("INTERNAL")

    monkeypatch.setattr(planner, "plan", plan)
    with pytest.raises(CompilerError):
        command(capsys, f"{model_file}:build", "--batch", BATCH, "--topology", "v3:8x8")


def test_compare_refuses_what_is_no_plan(tmp_path, capsys):
    good, bad, old = (tmp_path / f"{name}.json" for name in ("good", "bad", "old"))
    good.write_text(plan_samples.cpu().to_json())
    bad.write_text("{")
    fields = json.loads(good.read_text())
    del fields["mesh"]
    old.write_text(json.dumps(fields))
    for path in (bad, old):
        status, out, err = command(capsys, "--compare", good, path)
        assert (status, out) == (2, "")
        assert str(path) in err and len(err.splitlines()) == 1


def test_a_real_plan(model_file, tmp_path):
    """From the command line to the files, with nothing replaced."""
    files = [tmp_path / "p.json", tmp_path / "p.html"]
    printed = run_python(
        f"""
        from gshard_tf.planning import arguments as plan_command
        status = plan_command.main([
            "{model_file}:with_batch", "--topology", "cpu:2", "--mesh", "data=2",
            "--rule", "batch=data", "--json", "{files[0]}", "--html", "{files[1]}",
            "--no-cache",
        ])
        print("status", status)
        """
    )
    assert printed.endswith("status 0\n")
    plan = Plan.from_json(files[0].read_text())
    assert (plan.model, plan.topology, plan.mesh) == ("small", "cpu:2", {"data": 2})
    assert plan.parameters == 4 * 8 + 8 + 8 + 1
    assert plan.inputs == ["float32[16,4]", "float32[16,1]"]
    # Gradients are summed over the axis of the batch.
    assert plan.count("all-reduce") > 0
    assert f"{plan}\n" in printed
    assert "small, train, on cpu:2" in files[1].read_text()


def test_the_entry_point():
    text = pathlib.Path(ROOT, "setup.py").read_text()
    assert '"gshard-plan=gshard_tf.planning.arguments:main"' in text


def test_the_documented_command(tmp_path, asked, capsys, monkeypatch):
    text = pathlib.Path(ROOT, "docs", "planning.md").read_text()
    section = text[text.index("## The command") : text.index("## The page")]
    [source] = re.findall(r"```python\n(.*?)```", section, flags=re.DOTALL)
    [line] = re.findall(r"```bash\n(.*?)```", section, flags=re.DOTALL)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    pathlib.Path("model.py").write_text(source)
    program, *arguments = shlex.split(line.replace("\\\n", " "))
    status, _, err = command(capsys, *arguments)
    assert (program, status) == ("gshard-plan", 0), err
    assert asked[0]["rules"].rules == {"batch": "data"}
    assert pathlib.Path("plan.json").is_file() and pathlib.Path("plan.html").is_file()
