"""Builds the wheel, installs it into a fresh environment and looks at what came.

    python .ci/wheel.py FOLDER

FOLDER receives the wheel and the environment; it is made. twine is installed beside the
interpreter that runs this.
"""

import subprocess
import sys
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = {"gshard_tf", "keras_layers", "gshard_examples"}
COMMANDS = ("gshard-translate", "gshard-plan", "gshard-checkpoints", "gshard-run")
# In milliseconds, of `import gshard_tf` in a process that has imported nothing else.
IMPORT_BUDGET = 50
USE = """
import sys, time
start = time.perf_counter()
import gshard_tf
milliseconds = 1e3 * (time.perf_counter() - start)
heavy = {"tensorflow", "keras", "jax", "numpy"} & set(sys.modules)
if heavy:
    raise SystemExit(f"import gshard_tf must not import {heavy}")
if milliseconds > float(sys.argv[1]):
    raise SystemExit(f"import gshard_tf must be quick. Received: {milliseconds:.0f} ms")
import gshard_examples.serving, gshard_examples.translation, keras_layers
from gshard_tf.planning.html.page import page
for name in gshard_tf.__all__:
    getattr(gshard_tf, name)
for module in (gshard_tf, keras_layers, gshard_examples):
    if "site-packages" not in module.__file__:
        raise SystemExit(f"must come from the wheel. Received: {module.__file__}")
for absent in ("examples", "benchmarks", "tests"):
    try:
        __import__(absent)
    except ImportError:
        continue
    raise SystemExit(f"the wheel must not install {absent}")
print(f"import gshard_tf: {milliseconds:.0f} ms")
"""


def run(*command: object, **options) -> None:
    print("+", *(part for part in command if part is not USE), flush=True)
    subprocess.run([str(part) for part in command], check=True, **options)


def main() -> int:
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "-q")
    run(*pip, "wheel", "--no-deps", "--wheel-dir", folder, ROOT)
    [wheel] = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    top = {name.split("/")[0] for name in names if ".dist-info" not in name}
    if top != PACKAGES:
        raise SystemExit(f"the wheel must hold {PACKAGES}. Received: {top}")
    page = "gshard_tf/planning/html"
    for needed in (
        "gshard_tf/py.typed",
        "keras_layers/py.typed",
        f"{page}/plan.html.j2",
        f"{page}/page.css",
        f"{page}/page.js",
    ):
        if needed not in names:
            raise SystemExit(f"the wheel must hold {needed}")
    if not any(name.endswith("licenses/LICENSE") for name in names):
        raise SystemExit("the wheel must hold the licence")
    run(*pip, "install", "twine>=6.1,<7")
    run(sys.executable, "-m", "twine", "check", "--strict", wheel)
    fresh = folder / "environment"
    venv.create(fresh, with_pip=True, clear=True)
    python = fresh / "bin" / "python"
    run(python, *pip[1:], "install", f"{wheel}[translation,serve,html]")
    run(python, "-m", "pip", "check")
    run(python, "-c", USE, IMPORT_BUDGET, cwd="/")
    for command in COMMANDS:
        run(fresh / "bin" / command, "--version", cwd="/")
    return 0


if __name__ == "__main__":
    sys.exit(main())
