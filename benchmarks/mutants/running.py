"""Runs tests on a copy of the project, each time in a fork of this process.

This process has loaded TensorFlow, Keras and jax, which takes longer than most tests,
and has started nothing of them.
"""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.mutants.mutant import Mutant

ROOT = Path(__file__).resolve().parents[2]

# As tests/conftest.py has it; jax and TensorFlow look when they are loaded.
_ENVIRONMENT = {
    "TF_CPP_MIN_LOG_LEVEL": "3",
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": "--xla_backend_optimization_level=0 "
    "--xla_cpu_parallel_codegen_split_count=1",
}


class Copy:
    """A copy of the project in a folder of its own, for faults and tests of them.

    What git tracks, and what it would; nothing else of the working tree is read, and
    nothing of it is written.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.root = folder / "project"
        listed = subprocess.run(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
            cwd=ROOT,
            capture_output=True,
            check=True,
        )
        for name in filter(None, listed.stdout.decode().split("\0")):
            if (ROOT / name).is_file():  # else it was removed, and git not yet told
                target = self.root / name
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(ROOT / name, target)

    @contextlib.contextmanager
    def with_fault(self, mutant: Mutant) -> Iterator[None]:
        """Puts a fault in, for as long as it is entered."""
        path = self.root / mutant.file
        source = path.read_text("utf-8")
        path.write_text(mutant.applied(source), "utf-8")
        try:
            yield
        finally:
            path.write_text(source, "utf-8")

    def run(self, tests: Sequence[str], limit: float) -> "Ending":
        """Runs tests up to the first that fails.

        Args:
            tests: Files or node ids.
            limit: Seconds after which it is ended.
        """
        log = self.folder / "log"
        begun = time.monotonic()
        pid = os.fork()
        if pid == 0:
            code = 70
            try:
                code = self._test(tests, log)
            finally:
                os._exit(code)
        over = False
        try:
            # Not yet waited for: until then the number of its group is nobody else's.
            flags = os.WEXITED | os.WNOHANG | os.WNOWAIT
            while os.waitid(os.P_PID, pid, flags) is None:
                over = time.monotonic() - begun > limit
                if over:
                    break
                time.sleep(0.05)
        finally:
            # With what its tests have started and left.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)  # before it had a group of its own
            _, status = os.waitpid(pid, 0)
        code = None if over else os.waitstatus_to_exitcode(status)
        printed = log.read_text("utf-8", errors="replace") if log.exists() else ""
        return Ending(code, time.monotonic() - begun, printed)

    def _test(self, tests: Sequence[str], log: Path) -> int:
        """Runs the tests in the fork, as `pytest` in the copy would."""
        os.setsid()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.chdir(self.root)
        scratch = self.folder / "scratch"
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir()
        os.environ["TMPDIR"] = tempfile.tempdir = str(scratch)
        # A file that changes twice in a second would leave compiled code that is old.
        os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
        sys.dont_write_bytecode = True
        for name in [
            name for name in sys.modules if name.split(".")[0] == "benchmarks"
        ]:
            del sys.modules[name]
        ours = ("", ".", str(ROOT))
        sys.path[:] = [str(self.root), *(p for p in sys.path if p not in ours)]
        os.environ.pop("PYTHONPATH", None)
        import pytest

        # Those that a mutant names run, slow ones too.
        options = ["-n", "0", "-q", "-x", "-p", "no:cacheprovider", "-m", ""]
        code = pytest.main([*options, f"--basetemp={scratch / 'pytest'}", *tests])
        sys.stdout.flush()
        sys.stderr.flush()
        return int(code)


class Ending:
    """The end of a run of tests.

    Args:
        code: The exit code, negative for a signal; None where the time was over.
        seconds: How long it took.
        printed: What it printed.

    Attributes:
        verdict: "passed"; "failed", also where it crashed or hung; or "broken" where no
            test came to run.
        by: The test that failed first, or how else it ended.
    """

    def __init__(self, code: int | None, seconds: float, printed: str):
        self.seconds = seconds
        self.printed = printed
        failed = re.search(r"^(?:FAILED|ERROR) (\S+::\S+)", printed, re.M)
        self.by = failed.group(1) if failed else ""
        if code == 0:
            self.verdict = "passed"
        elif code is None or code < 0:
            self.verdict = "failed"
            self.by = "the time was over" if code is None else f"signal {-code}"
        else:
            self.verdict = "failed" if code == 1 and failed else "broken"


@contextlib.contextmanager
def copy_of_the_project() -> Iterator[Copy]:
    """A copy that is gone afterwards, also after Ctrl-C or SIGTERM."""
    _load()

    def end(*_):
        raise SystemExit(128 + signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, end)
    folder = Path(tempfile.mkdtemp(prefix="mutants-"))
    try:
        yield Copy(folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        signal.signal(signal.SIGTERM, before)


def _load() -> None:
    """Loads what every test needs, and nothing of the project."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    import hypothesis  # noqa: F401
    import jax  # noqa: F401
    import keras  # noqa: F401
    import pytest  # noqa: F401
    import tensorflow  # noqa: F401
