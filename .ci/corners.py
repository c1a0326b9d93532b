"""Runs the default tests at the corners of the supported versions, and prints a table.

    python .ci/corners.py [--corner oldest] [--folder DIR] [-- PYTEST ARGUMENTS]

Each corner is a virtual environment of its own in DIR (default: `.corners`), made when
it is not there. The interpreters `python3.11`, `python3.12` and `python3.13` must be on
PATH. A corner takes as long as the tests do. The exit status is 1 if a corner failed.
"""

import argparse
import dataclasses
import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("tensorflow", "keras", "jax")


@dataclasses.dataclass(frozen=True)
class Corner:
    """Versions that are installed together.

    Attributes:
        python: The interpreter's minor version.
        constraints: Requirements that narrow those of `setup.py`; packages that none
            names are the newest that install.
        extras: The extras that are installed.
    """

    python: str
    constraints: tuple[str, ...] = ()
    extras: str = "test"


CORNERS = {
    # The Model Garden's last release needs TensorFlow 2.20.
    "oldest": Corner(
        "3.11",
        ("tensorflow==2.20.*", "keras==3.13.*", "jax==0.9.*", "jaxlib==0.9.*"),
        "test,model-garden",
    ),
    "python 3.11": Corner("3.11"),
    "python 3.12": Corner("3.12", ("tensorflow==2.20.*",)),
    "newest": Corner("3.13", ("tensorflow==2.21.*",)),
}


def environment(corner: Corner, folder: Path, here: bool) -> Path:
    """Returns the interpreter of the corner's environment; makes the environment."""
    python = folder / "bin" / "python"
    if python.is_file():
        return python
    interpreter = shutil.which(f"python{corner.python}")
    if here:
        interpreter = sys.executable
    if interpreter is None:
        raise SystemExit(
            f"`python{corner.python}` must be on PATH for this corner. Received: none"
        )
    run([interpreter, "-m", "venv", folder])
    packages = [f"{ROOT}[{corner.extras}]", *corner.constraints]
    run([python, "-m", "pip", "install", "--quiet", "--editable", *packages])
    return python


def run(command: list) -> None:
    subprocess.run([str(part) for part in command], check=True)


def installed(python: Path) -> dict[str, str]:
    """Returns the versions in an environment."""
    code = (
        "import importlib.metadata as m, json, platform\n"
        f"versions = {{name: m.version(name) for name in {PACKAGES!r}}}\n"
        "print(json.dumps({'python': platform.python_version()} | versions))"
    )
    done = subprocess.run(
        [python, "-c", code], check=True, capture_output=True, text=True
    )
    return json.loads(done.stdout)


def tests(python: Path, arguments: list[str]) -> tuple[bool, str]:
    """Returns whether pytest passed, and its last line."""
    process = subprocess.Popen(
        [python, "-m", "pytest", "-q", *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    last = ""
    for line in process.stdout:
        sys.stdout.write(line)
        last = line.strip() or last
    return process.wait() == 0, re.sub(r"^=+ | =+$", "", last)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--corner", choices=CORNERS, action="append")
    parser.add_argument("--folder", type=Path, default=ROOT / ".corners")
    parser.add_argument(
        "--here", action="store_true", help="use this interpreter at each corner"
    )
    parser.add_argument("pytest", nargs="*", help="arguments of pytest, after --")
    options = parser.parse_args()
    rows, passed = [], True
    for name in options.corner or CORNERS:
        start = time.monotonic()
        python = environment(
            CORNERS[name], options.folder / name.replace(" ", "-"), options.here
        )
        print(f"+ {name}", flush=True)
        right, line = tests(python, options.pytest)
        passed &= right
        versions = installed(python)
        minutes = f"{(time.monotonic() - start) / 60:.1f}"
        rows.append([name, *versions.values(), line, minutes])
    print(f"| corner | python | {' | '.join(PACKAGES)} | tests | minutes |")
    print("|---" * (len(PACKAGES) + 4) + "|")
    for row in rows:
        print(f"| {' | '.join(row)} |")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
