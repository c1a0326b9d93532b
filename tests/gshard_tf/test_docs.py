"""The guides' examples run, and print what the guides say that they print."""

import contextlib
import io
import pathlib
import re

import keras
import pytest

DOCS = pathlib.Path(__file__).resolve().parents[2] / "docs"


def blocks(name):
    return re.findall(r"```python\n(.*?)```", (DOCS / name).read_text(), re.DOTALL)


@pytest.mark.parametrize(
    "name",
    [
        "annotations.md",
        "checkpoints.md",
        "getting_started.md",
        "multihost.md",
        "packing.md",
        "partitioning.md",
        "strategies.md",
        "verify.md",
    ],
)
def test_examples(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    keras.backend.clear_session(free_memory=False)
    names = {"__name__": "example"}
    for block in blocks(name):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(block, name, "exec"), names)  # noqa: S102
        # Comments after a print are its output; "..." stands for anything.
        told = "\n".join(re.findall(r"^# (.*)$", block, re.MULTILINE))
        wanted = r".*".join(re.escape(part) for part in told.split("..."))
        wanted = re.sub(r"(\\ |\\\n|\n)+", r"\\s+", wanted)
        assert re.search(wanted, printed.getvalue(), re.DOTALL), (
            f"{told}\n--- but it printed\n{printed.getvalue()}"
        )
