"""Runs a piece of Python in a process of its own."""

import os
import pathlib
import subprocess
import sys
import textwrap

ROOT = pathlib.Path(__file__).resolve().parent.parent


def run_python(code: str, *, with_repo: bool = True, timeout: int = 240, **environ):
    """Runs `code` and returns what it printed; fails with its errors if it fails."""
    env = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", **environ}
    env.pop("PYTHONPATH", None)
    if with_repo:
        env["PYTHONPATH"] = str(ROOT)
    done = subprocess.run(  # noqa: S603
        [sys.executable, "-c", textwrap.dedent(code)],
        env=env,
        cwd="/",
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == 0, f"exit {done.returncode}\n{done.stderr[-4000:]}"
    return done.stdout
