"""Processes forked from one that has loaded TensorFlow, Keras and jax.

Loading them takes a core six seconds, and most scripts of tests one. Nothing of them
has started there, and nothing of this project is loaded: a fork is as a new process in
all but what `sys.modules` holds. One such process serves all workers of a test run.
"""

import atexit
import contextlib
import functools
import json
import os
import select
import signal
import socket
import subprocess
import sys
import types

# Where the process that forks listens, if another one has begun it.
_given = None


class Fork:
    """A script that runs in a fork.

    Args:
        code: Text of the script.
        arguments: The rest of its `sys.argv`.
        env: Its environment. Of what is read on loading, `JAX_PLATFORMS` holds.
        cwd: Its working folder.
        stdout: A file.
        stderr: A file.

    Attributes:
        pid: Number of the process.
    """

    def __init__(self, code, arguments=(), *, env, cwd, stdout, stderr):
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(_given or begin())
        socket.send_fds(self._socket, [b"."], [stdout.fileno(), stderr.fileno()])
        request = [code, list(map(str, arguments)), dict(env), str(cwd)]
        self._socket.sendall(json.dumps(request).encode())
        self._socket.shutdown(socket.SHUT_WR)
        self._answers = self._socket.makefile()
        self._code = None
        self.pid = int(self._answers.readline())

    def wait(self, timeout=None):
        """Waits for its end; returns the exit code, negative for a signal."""
        if self._code is None:
            self._socket.settimeout(timeout)
            try:
                self._code = int(self._answers.readline())
            except TimeoutError:
                # A file that timed out once cannot be read again.
                self._socket.settimeout(None)
                self._answers = self._socket.makefile()
                raise
            self._answers.close()
            self._socket.close()
        return self._code

    def kill(self):
        """Ends it, if it runs."""
        if self._code is None:
            with contextlib.suppress(ProcessLookupError):  # it has ended by itself
                os.kill(self.pid, signal.SIGKILL)


@functools.cache
def begin():
    """Begins the process that forks, which ends with this one; returns its address.

    It loads what it loads at the first request.
    """
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind("")  # Linux finds a name, which is of no file
        listening.listen(64)
        address = listening.getsockname()
        # Of the tests' own environment: what is loaded looks there.
        process = subprocess.Popen(
            [sys.executable, __file__, str(listening.fileno())],
            pass_fds=[listening.fileno()],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
        )

    def end():
        process.stdin.close()
        process.wait()

    atexit.register(end)
    return address


def use(address):
    """Lets the process at an address fork for this one."""
    global _given
    _given = address


def _wait_for_request(listening):
    """Returns when there is one; ends the server when who began it has ended."""
    ready, _, _ = select.select([listening, 0], [], [])
    if 0 in ready:
        _reap()
        os._exit(0)


def _next_request(listening):
    """Waits for requests in the server; returns each in a fork of it."""
    while True:
        _wait_for_request(listening)
        conversation, _ = listening.accept()
        if os.fork() == 0:
            break
        conversation.close()
        _reap()
    # Here is one process that waits for another, so that the server need not.
    listening.close()
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    _, files, _, _ = socket.recv_fds(conversation, 1, 2)
    request = json.load(conversation.makefile())
    pid = os.fork()
    if pid:
        for file in files:
            os.close(file)
        conversation.sendall(f"{pid}\n".encode())
        _, status = os.waitpid(pid, 0)
        with contextlib.suppress(BrokenPipeError):  # who asked did not wait
            conversation.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())
        os._exit(0)
    conversation.close()
    for file, standard in zip(files, (1, 2), strict=True):
        os.dup2(file, standard)
        os.close(file)
    return request


def _reap():
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:  # there is none
        pass


def _serve():
    listening = socket.socket(fileno=int(sys.argv[1]))
    _wait_for_request(listening)

    import gc

    import jax
    import keras  # noqa: F401
    import numpy as np

    gc.freeze()  # what a collection touches, a fork copies
    code, arguments, env, cwd = _next_request(listening)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    jax.config.update("jax_platforms", env.get("JAX_PLATFORMS"))
    np.random.seed()
    sys.argv = ["-c", *arguments]
    paths = filter(None, env.get("PYTHONPATH", "").split(os.pathsep))
    sys.path[:1] = ["", *paths]
    main = sys.modules["__main__"] = types.ModuleType("__main__")
    exec(compile(code, "<string>", "exec"), main.__dict__)  # noqa: S102


if __name__ == "__main__":
    _serve()
