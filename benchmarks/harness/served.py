"""Sides that are measured in processes of their own, one project in each."""

import json
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

MARK = "@@ "


class SideError(RuntimeError):
    """A side's process ended by itself; its last words."""


class Side:
    """A process that answers commands, from `serve`, one at a time.

    Args:
        name: For messages.
        module: The module that is run, with `python -m`.
        arguments: Its arguments.
        limit: Seconds for one answer, after which the process is ended: one that hangs
            would stop all.

    Attributes:
        hello: What it says when it is ready.
    """

    def __init__(
        self, name: str, module: str, arguments: Sequence[str], limit: float = 300
    ):
        self.name, self.limit = name, limit
        self.errors = tempfile.TemporaryFile("w+")
        self.process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
        )
        self.hello = self._read()

    def ask(self, command: str) -> Any:
        """Returns the answer to a command; raises `SideError` if there is none."""
        self.process.stdin.write(command + "\n")
        self.process.stdin.flush()
        return self._read()

    def _read(self) -> Any:
        clock = threading.Timer(self.limit, self.process.kill)
        clock.start()
        try:
            for line in self.process.stdout:
                if line.startswith(MARK):
                    return json.loads(line[len(MARK) :])
        finally:
            clock.cancel()
        self.errors.seek(0)
        last = self.errors.read().strip()[-2000:]
        self.close()
        raise SideError(
            f"{self.name} ended, or was ended after {self.limit:.0f} s: {last}"
        )

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()
        self.errors.close()


def serve(hello: Any, commands: Mapping[str, Callable[[], Any]]) -> None:
    """Answers on stdout the commands that come on stdin, until another one comes.

    Args:
        hello: Said first, when everything is ready.
        commands: What to return for each, as JSON has it.
    """
    _answer(hello)
    for line in sys.stdin:
        if line.strip() not in commands:
            return
        _answer(commands[line.strip()]())


def _answer(value: Any) -> None:
    print(MARK + json.dumps(value), flush=True)
