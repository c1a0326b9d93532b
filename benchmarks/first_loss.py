"""Seconds from an empty machine to the quick start's first printed loss.

    python -m benchmarks.first_loss [--json]

What docs/getting_started.md says is done, with nothing cached: an environment is made,
the package of this checkout installed into it, every download fetched again, and
`python -m gshard_examples.quickstart` started, until it prints a loss. The network
decides much of it: the bytes that were installed are printed beside the times.
"""

import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.harness.command_line import circumstances, make_parser, say, show

ROOT = Path(__file__).resolve().parents[1]


def first_loss(python: Path) -> float:
    """Seconds until the quick start has printed a loss, in an environment."""
    start = time.perf_counter()
    with subprocess.Popen(
        [python, "-m", "gshard_examples.quickstart"],
        stdout=subprocess.PIPE,
        text=True,
        env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
        cwd=python.parent,
    ) as process:
        for line in process.stdout or ():
            if re.search(r"loss: \d", line):
                seconds = time.perf_counter() - start
                say(line.strip())
                process.kill()
                return seconds
    raise RuntimeError(
        f"The quick start must print a loss. It ended with {process.returncode}"
    )


def measure(folder: Path) -> dict[str, Any]:
    """Seconds of each part, with an environment in `folder`."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    made = time.perf_counter()
    python = folder / "bin" / "python"
    subprocess.run(
        [python, "-m", "pip", "install", "-q", "--no-cache-dir", "-e", ROOT], check=True
    )
    installed = time.perf_counter()
    size = sum(f.lstat().st_size for f in folder.rglob("*") if f.is_file())
    loss = first_loss(python)
    return {
        "environment made, s": round(made - start, 1),
        "installed, s": round(installed - made, 1),
        "GB installed": round(size / 1e9, 2),
        "to the first loss, s": round(loss, 1),
        "in all, minutes": round((installed - start + loss) / 60, 1),
    }


def main() -> None:
    options = make_parser(__doc__ or "").parse_args()
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        result = measure(Path(folder))
    show(result | circumstances(begun, quick=False), options.json)


if __name__ == "__main__":
    main()
