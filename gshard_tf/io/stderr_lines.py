"""Lines of C++ libraries that nobody can act on, kept from standard error.

TensorFlow logs some lines before its logger is set up, whatever is asked of it. They
are named here, each by itself; everything else that is written meanwhile is passed on.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import re
import sys
import tempfile
from collections.abc import Iterator, Sequence

#: What `import tensorflow` says, twice. `TF_CPP_MIN_LOG_LEVEL` is read later.
IMPORT = (
    r"WARNING: All log messages before absl::InitializeLog\(\) is called are written "
    r"to STDERR$",
    r"I0000 .* port\.cc:\d+\] oneDNN custom operations are on\. ",
    r"I0000 .* cudart_stub\.cc:\d+\] Could not find cuda drivers on your machine, ",
)


@contextlib.contextmanager
def without_lines(patterns: Sequence[str]) -> Iterator[None]:
    """Leaves out lines that the process writes to standard error meanwhile.

    Python's and C++'s, of all threads. The others are written when this is left, with
    an error too; so enter it for moments, not for work.

    Args:
        patterns: Regular expressions that match a line from its beginning.
    """
    unwanted = [re.compile(pattern.encode()) for pattern in patterns]
    sys.stderr.flush()
    with tempfile.TemporaryFile() as written:
        kept = os.dup(2)
        os.dup2(written.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(kept, 2)
            os.close(kept)
            written.seek(0)
            for line in written:
                if not any(pattern.match(line) for pattern in unwanted):
                    os.write(2, line)


def import_quietly(module: str) -> None:
    """Imports TensorFlow, or what imports it, without its lines, if it is installed."""
    with without_lines(IMPORT), contextlib.suppress(ImportError):
        importlib.import_module(module)
