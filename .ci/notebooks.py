"""Makes the notebooks of `docs/notebooks` from examples; `--check` compares only.

    python .ci/notebooks.py [--check]

An example is script and notebook: `# %%` begins a cell. jupytext comments cells of the
tag `active-ipynb` out in the script; those of `active-py` are not in the notebook.
Notebooks are kept without outputs.
"""

import argparse
import sys
from pathlib import Path

import jupytext
import nbformat

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ROOT / "examples" / "gshard_examples"
TARGETS = ROOT / "docs" / "notebooks"
EXAMPLES = ("quickstart", "vision")
KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}


def make(example: str) -> nbformat.NotebookNode:
    """Returns the notebook of an example, the same each time."""
    notebook = jupytext.read(SOURCES / f"{example}.py", fmt="py:percent")
    notebook.metadata = nbformat.from_dict({"kernelspec": KERNEL})
    notebook.cells = [
        cell
        for cell in notebook.cells
        if "active-py" not in cell.metadata.get("tags", ())
    ]
    for i, cell in enumerate(notebook.cells):
        cell.id, cell.metadata = f"cell-{i}", nbformat.from_dict({})
        cell.source = cell.source.strip("\n")
    return notebook


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    stale = []
    for example in EXAMPLES:
        path = TARGETS / f"{example}.ipynb"
        text = nbformat.writes(make(example)) + "\n"
        if options.check:
            if not path.is_file() or path.read_text("utf-8") != text:
                stale.append(str(path.relative_to(ROOT)))
        else:
            path.parent.mkdir(exist_ok=True)
            path.write_text(text, "utf-8")
    if stale:
        print(
            f"Run python .ci/notebooks.py. Stale: {', '.join(stale)}", file=sys.stderr
        )
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
