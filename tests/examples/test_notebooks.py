"""The notebooks are what their examples make, and run."""

import importlib.util
import os
import re
import subprocess
import sys

import pytest
from processes import PYTHONPATH, ROOT

MISSING = [
    name
    for name in ("jupytext", "nbclient", "ipykernel")
    if importlib.util.find_spec(name) is None
]
pytestmark = pytest.mark.skipif(
    bool(MISSING), reason=f"{', '.join(MISSING)}: pip install -e '.[test]'"
)
NOTEBOOKS = ROOT / "docs" / "notebooks"


def test_notebooks_are_made_of_the_examples():
    done = subprocess.run(
        [sys.executable, str(ROOT / ".ci" / "notebooks.py"), "--check"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def run(name, tmp_path, monkeypatch, **sizes):
    """Runs a notebook with other values of its constants; returns texts and HTML."""
    import nbclient
    import nbformat

    notebook = nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)
    for constants, values in sizes.items():
        names = constants.replace("__", ", ")
        changed = 0
        for cell in notebook.cells:
            cell.source, count = re.subn(
                rf"^{names} = .*$", f"{names} = {values}", cell.source, flags=re.M
            )
            changed += count
        assert changed == 1, names
    # The kernel is a process of its own, in an empty folder.
    monkeypatch.setenv("PYTHONPATH", PYTHONPATH)
    monkeypatch.setenv("XLA_FLAGS", "")
    nbclient.NotebookClient(
        notebook,
        timeout=600,
        kernel_name="python3",
        resources={"metadata": {"path": str(tmp_path)}},
    ).execute()
    assert os.listdir(tmp_path) == []
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    texts = "".join(o.text for o in outputs if o.output_type == "stream")
    shown = [o.data["text/html"] for o in outputs if o.output_type == "execute_result"]
    return texts, shown


def cells(row, table):
    """The cells of the row of a weight, in the table that `describe` shows."""
    [found] = [line for line in table.split("<tr>") if f">{row}</td>" in line]
    return re.findall(r"<td[^>]*>(.*?)</td>", found)


@pytest.mark.slow  # `.ci/run` runs it
def test_the_quickstart_runs_as_a_notebook(tmp_path, monkeypatch):
    sizes = {"STEPS_PER_EPOCH__EPOCHS": "6, 4"}
    texts, [table] = run("quickstart", tmp_path, monkeypatch, **sizes)
    assert "Epoch 1/4" in texts and texts.count("Epoch 3/4") == 2
    losses = [float(loss) for loss in re.findall(r"- loss: ([\d.]+)", texts)]
    # Two epochs before the stop, two after it.
    assert len(losses) == 4 and losses[-1] < losses[0] < 4.5, texts
    assert cells("moe/experts/wi", table)[2] == "expert,-,-"


@pytest.mark.slow  # as another example does
def test_the_digits_run_as_a_notebook(tmp_path, monkeypatch):
    sizes = {
        "EPOCHS__STEPS_PER_EPOCH": "2, 40",
        "WIDTH__HIDDEN__BLOCKS__EXPERTS__BATCH": "16, 16, 1, 8, 32",
    }
    texts, [table] = run("vision", tmp_path, monkeypatch, **sizes)
    # One of ten is right by chance.
    [right] = re.findall(r"held out, ([\d.]+)% are right", texts)
    assert float(right) > 50, texts
    assert cells("moe_0/experts/wi", table)[2] == "expert,-,-"
