"""The rules of the house: formatting, lint, types, and who may import whom."""

import ast
import os
import pathlib
import re
import subprocess
import sys

import pytest
from installed_versions import JAX
from processes import PYTHONPATH, ROOT, run_python

PACKAGES = ("gshard_tf", "keras_layers", "examples", "benchmarks")


def python_files(package):
    return sorted((ROOT / package).rglob("*.py"))


def imported(path):
    """(module, line, whether at the top level) of each import in a file."""
    tree = ast.parse(path.read_text("utf-8"))
    top = set(tree.body)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno, node in top
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module, node.lineno, node in top


@pytest.mark.parametrize("arguments", [["format", "--check"], ["check"]])
def test_ruff(arguments):
    done = subprocess.run(
        [sys.executable, "-m", "ruff", *arguments, "."],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("package", "forbidden"),
    [
        ("gshard_tf", ("keras_layers", "gshard_examples", "benchmarks")),
        ("keras_layers", ("gshard_examples", "benchmarks", "jax", "jaxlib")),
        ("examples", ("benchmarks", "jax", "jaxlib")),
    ],
)
def test_arrows_point_one_way(package, forbidden):
    for path in python_files(package):
        for module, line, _ in imported(path):
            assert module.split(".")[0] not in forbidden, f"{path}:{line}: {module}"


def test_layers_know_annotations_only():
    """Of gshard_tf, layers import the root and compat: no strategy, no program."""
    for path in python_files("keras_layers"):
        text = path.read_text("utf-8")
        assert "Strategy" not in re.sub(r'""".*?"""', "", text, flags=re.S), path
        for module, line, _ in imported(path):
            allowed = not module.startswith("gshard_tf.") or module.startswith(
                "gshard_tf.compat."
            )
            assert allowed, f"{path}:{line}: {module}"


def test_jax_is_imported_late_and_in_few_places():
    allowed = {
        "core_program.py",
        "device_arrays.py",
        "devices.py",
        "dropout.py",
        "halo.py",
        "halo_exchange.py",
        "exporter.py",
        "initialize.py",
        "jax_devices.py",
        "jax_distributed.py",
        "jax_hlo.py",
        "loader.py",
        "local_batches.py",
        "manual.py",
        "nonfinite.py",
        "permutations.py",
        "program.py",
        "ragged_dispatch.py",
        "ragged_dot.py",
        "ragged_dot_tpu.py",
        "ragged_exchange.py",
        "ring_attention.py",
        "runner.py",
        "shardy.py",
        "tf_call_module.py",
    }
    for path in python_files("gshard_tf"):
        for module, line, at_top in imported(path):
            if module.split(".")[0] in ("jax", "jaxlib"):
                assert path.name in allowed, f"{path}:{line}"
                assert not at_top, f"{path}:{line}: imported on loading"
    # (Keras imports jax by itself, where it is installed.) Ours starts no backend:
    # its devices can still be asked for.
    code = """
        import gshard_tf, keras_layers
        gshard_tf.request_cpu_devices(3)
        import jax
        print(len(jax.devices()))
    """
    assert run_python(code).strip() == "3"


def test_public_functions_have_type_hints_and_docstrings():
    missing = []
    for package in ("gshard_tf", "keras_layers"):
        for path in python_files(package):
            tree = ast.parse(path.read_text("utf-8"))
            for node in tree.body:
                if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                    if not (ast.get_docstring(node) or _sets_doc(node)):
                        missing.append(f"{path}:{node.lineno} docstring")
                    functions = [n for n in node.body if isinstance(n, ast.FunctionDef)]
                elif isinstance(node, ast.FunctionDef):
                    functions = [node]
                else:
                    continue
                for function in functions:
                    if function.name.startswith("_") and function.name != "__init__":
                        continue
                    arguments = function.args
                    named = [*arguments.posonlyargs, *arguments.args]
                    named += arguments.kwonlyargs
                    for argument in named:
                        if argument.annotation is None and argument.arg not in (
                            "self",
                            "cls",
                        ):
                            missing.append(f"{path}:{function.lineno} {argument.arg}")
                    if function.returns is None and function.name != "__init__":
                        missing.append(f"{path}:{function.lineno} returns")
    assert not missing, "\n".join(missing)


def _sets_doc(node):
    return any(
        isinstance(n, ast.Assign) and getattr(n.targets[0], "id", "") == "__doc__"
        for n in node.body
    )


def test_the_readme_is_true():
    text = (ROOT / "README.md").read_text("utf-8")
    for link in re.findall(r"\]\((docs/[^)#]+)", text):
        assert (ROOT / link).is_file(), link
    script = (ROOT / ".ci" / "run").read_text("utf-8")
    # .ci/run takes its commands from here.
    assert len(re.findall(r"bin/pytest$", text, flags=re.M)) == 1
    assert len(re.findall(r"bin/gshard-translate$", text, flags=re.M)) == 1
    assert "README.md" in script


def test_the_readme_example_runs():
    text = (ROOT / "README.md").read_text("utf-8")
    [example] = re.findall(r"```python\n(.*?)```", text, flags=re.S)
    assert len(example.strip().splitlines()) <= 15
    printed = run_python(example, timeout=300)
    assert re.search(r"expert,-,-", printed)


def test_nothing_speaks_of_a_machine():
    done = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if done.returncode:
        pytest.skip("not a git checkout")
    own = pathlib.Path(__file__).name
    for name in done.stdout.split():
        path = ROOT / name
        assert path.stat().st_size < 500_000, f"{name} is too large for git"
        if path.name == own or path.suffix in (".png", ".ico"):
            continue
        text = path.read_text("utf-8")
        assert not re.search(r"(?<![\w.])/(work|opt|root|tmp)/\w", text), name


def test_imports_keep_the_contracts():
    """`[tool.importlinter]` in pyproject.toml: no import runs upward or in a circle."""
    command = pathlib.Path(sys.executable).with_name("lint-imports")
    done = subprocess.run(
        [command, "--no-cache"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": PYTHONPATH},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.skipif(JAX < (0, 10), reason="types of older packages are wrong")
def test_types():
    done = subprocess.run(
        [sys.executable, "-m", "mypy"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


PRIVATE = re.compile(
    r"(tensorflow\.(python|compiler|core)|keras\.src|tf_keras\.src|jax\._src"
    r"|jax\.extend|jaxlib\.(_|mlir|xla_client))(\.|$)"
)


def test_private_apis_of_others_stand_in_compat():
    for package in ("gshard_tf", "keras_layers", "examples"):
        for path in python_files(package):
            if {"compat", "testing"} & set(path.relative_to(ROOT).parts):
                continue
            for module, line, _ in imported(path):
                assert not PRIVATE.match(module), f"{path}:{line}: {module}"


CLAUSES = ("What", "Which", "How", "Where", "Whether", "Who", "Of", "Inside", "That")


def test_docstrings_begin_with_a_noun_or_a_verb():
    """Not with a relative clause or a fragment."""
    wrong = []
    for package in ("gshard_tf", "keras_layers", "examples", "benchmarks"):
        for path in python_files(package):
            for node in ast.walk(ast.parse(path.read_text("utf-8"))):
                if isinstance(
                    node, ast.Module | ast.ClassDef | ast.FunctionDef
                ) and ast.get_docstring(node):
                    first = ast.get_docstring(node).split()[0].strip(",.:;")
                    if first in CLAUSES:
                        wrong.append(f"{path}:{getattr(node, 'lineno', 1)} {first}")
    assert not wrong, "\n".join(wrong)
