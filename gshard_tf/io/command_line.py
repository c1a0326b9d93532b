"""One style for all commands: an error is a line of standard error, and exit code 2."""

from __future__ import annotations

import argparse
import sys
from typing import NoReturn

# argparse's own, for input that cannot be used. 1 stays for what was found to be wrong,
# and for errors with a traceback.
BAD_INPUT = 2
# As shells do for Ctrl-C.
INTERRUPTED = 130


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, without the usage before it."""

    def error(self, message: str) -> NoReturn:
        self.exit(BAD_INPUT, f"{self.prog}: {message} (see {self.prog} --help)\n")


def report(prog: str, message: object, status: int = BAD_INPUT) -> int:
    """Writes `PROG: MESSAGE` to standard error, and returns the exit code.

    Args:
        prog: The name of the command.
        message: What is wrong.
        status: The exit code.
    """
    print(f"{prog}: {message}", file=sys.stderr, flush=True)
    return status
