"""The log of the runner: JSON lines."""

from __future__ import annotations

import json
import math
import pathlib
from typing import Any, TextIO

from gshard_tf.io.paths import make_folder


class Log:
    """Writes JSON lines to standard output and, with a folder, to a file."""

    def __init__(self, folder: pathlib.Path | None):
        self._file: TextIO | None = None
        if folder is not None:
            make_folder(folder)
            self._file = open(folder / "log.jsonl", "a", encoding="utf-8")

    def __call__(self, event: str, **fields: Any) -> None:
        """Writes one line, and flushes it."""
        line = json.dumps({"event": event, **fields})
        print(line, flush=True)
        if self._file is not None:
            print(line, file=self._file, flush=True)


def scalars(outputs: dict[str, Any]) -> dict[str, float | None]:
    """Returns the scalars among the outputs for JSON, in which NaN is null."""
    values: dict[str, float | None] = {}
    for name, value in outputs.items():
        if value.ndim == 0:
            number = float(value)
            values[name] = number if math.isfinite(number) else None
    return values
