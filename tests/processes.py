"""Runs a piece of Python in a process of its own."""

import contextlib
import os
import pathlib
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap

from forks import Fork

ROOT = pathlib.Path(__file__).resolve().parent.parent
# The packages of a checkout, for processes that a test starts.
PYTHONPATH = os.pathsep.join((str(ROOT), str(ROOT / "examples")))

# Of the environment, what a process may be given that has loaded everything.
READ_LATE = {"JAX_PLATFORMS", "XLA_FLAGS"}


def run_python(
    code: str,
    *,
    loaded: bool = True,
    with_repo: bool = True,
    timeout: int = 240,
    **environ,
):
    """Runs `code` and returns what it printed; fails with its errors if it fails.

    Args:
        code: A script.
        loaded: TensorFlow, Keras and jax are loaded when it begins, by which it begins
            six seconds sooner.
        with_repo: It can import the packages of this checkout.
        timeout: Seconds it may take.
        environ: Additions to the environment; others than `READ_LATE` are for a
            process in which nothing is loaded.
    """
    env = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", **environ}
    env.pop("PYTHONPATH", None)
    if with_repo:
        env["PYTHONPATH"] = PYTHONPATH
    code = textwrap.dedent(code)
    with (
        tempfile.TemporaryFile("w+") as printed,
        tempfile.TemporaryFile("w+") as errors,
    ):
        files = {"stdout": printed, "stderr": errors}
        if loaded and with_repo and set(environ) <= READ_LATE:
            process = Fork(code, env=env, cwd="/", **files)
        else:
            command = [sys.executable, "-c", code]
            process = subprocess.Popen(command, env=env, cwd="/", **files)  # noqa: S603
        try:
            status = process.wait(timeout)
        finally:
            process.kill()
        errors.seek(0)
        assert status == 0, f"exit {status}\n{errors.read()[-4000:]}"
        printed.seek(0)
        return printed.read()


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def forked(function, *arguments):
    """What `function` returns, as text, or the error it raises, in a forked child."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            said = str(function(*arguments))
        except BaseException as error:  # told to the parent
            said = f"{type(error).__name__}: {error}"
        os.write(writing, said.encode()[:60000])
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        said = pipe.read()
    assert os.waitpid(pid, 0)[1] == 0
    return said


@contextlib.contextmanager
def left_by_a_killed_process(begin):
    """Within it lives a forked child of a process that called `begin` and was killed.

    Gives the number of the killed one.
    """
    reading, writing = os.pipe()
    killed = os.fork()
    if killed == 0:
        try:
            kept = begin()
            if os.fork() == 0:
                signal.alarm(120)
                os.write(writing, str(os.getpid()).encode())
            signal.pause()
            del kept  # no sooner
        finally:
            os._exit(1)
    child = int(os.read(reading, 100))
    os.kill(killed, signal.SIGKILL)
    os.waitpid(killed, 0)
    try:
        os.kill(child, 0)
        yield killed
    finally:
        os.kill(child, signal.SIGKILL)
        os.close(reading)
        os.close(writing)
